"""Images listed in a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.storage.regular import open_regular
from duallora.streams.collection import Collection, Part
from duallora.streams.listed import Labelled, ListedImages, require_listed

_COLUMNS = ("path", "label", "split", "domain")
_NEEDED = ("path", "label")
_TRAIN = ("train", "")
_TEST = ("test", "val", "validation")


def read_table(path: Path) -> Collection:
    """Reads a table with the header ``path,label`` and perhaps ``split`` and ``domain``, in any order.

    Paths count from the table's folder. Without ``split``, or where no row is a test image, every fifth image
    of a class is one. Domains come in the order in which they first appear.

    Raises:
        DualLoRAError: the table cannot be read, a row says too little, or an image is missing or comes twice.
    """
    rows = _rows(path)
    require_listed(path.parent, list(rows), str(path))
    domains = list(dict.fromkeys(row["domain"] for row in rows.values()))
    tested = any(row["split"] in _TEST for row in rows.values())
    parts = []
    for domain in domains:
        own = {key: row for key, row in rows.items() if row["domain"] == domain}
        train, test = (_images(path, own, words) for words in (_TRAIN, _TEST))
        parts.append(Part(domain, train, test if tested else None))
    return Collection(path.stem, tuple(parts))


def _images(path: Path, rows: dict[str, dict[str, str]], words: tuple[str, ...]) -> ListedImages:
    chosen: list[Labelled] = [(key, row["label"]) for key, row in rows.items() if row["split"] in words]
    return ListedImages(path.parent, chosen)


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows by their path."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            _check_header(path, header)
            found: dict[str, dict[str, str]] = {}
            for row in reader:
                _add(found, row, f"line {reader.line_num} of {path}", header)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DualLoRAError(f"{path} cannot be read as a CSV file: save it as UTF-8 text") from error
    if not found:
        raise DualLoRAError(f"{path} names no image: write one path and label a line")
    used = {row["split"] for row in found.values()} & set(_TEST)
    if "test" in used and len(used) > 1:
        raise DualLoRAError(
            f"{path} has images of both test and {sorted(used - {'test'})[0]}: the images to test on are one "
            "set, leave the others out or call them train"
        )
    return found


def _check_header(path: Path, header: list[str]) -> None:
    if not set(_NEEDED) <= set(header) <= set(_COLUMNS) or len(set(header)) < len(header):
        raise DualLoRAError(
            f"the first line of {path} is {','.join(header) or 'empty'}: it must be path,label and may go on "
            "with split and domain"
        )


def _add(found: dict[str, dict[str, str]], row: dict[str, str | None], where: str, header: list[str]) -> None:
    if None in row or None in row.values():
        raise DualLoRAError(f"{where} has not {len(header)} fields as the header: put quotes around commas")
    cells = {name: (row.get(name) or "").strip() for name in _COLUMNS}
    cells["split"] = cells["split"].lower()
    for name in [*_NEEDED, *(["domain"] if "domain" in header else [])]:
        if not cells[name]:
            raise DualLoRAError(f"{where} has no {name}: fill it in or remove the line")
    if cells["split"] not in (*_TRAIN, *_TEST):
        raise DualLoRAError(f"{where} has the split {cells['split']!r}: it must be train, test or val")
    if cells["path"] in found:
        raise DualLoRAError(f"{where} names {cells['path']} a second time: leave one of the lines out")
    found[cells["path"]] = cells
