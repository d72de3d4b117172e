"""Images listed in a CSV file."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duallora.errors import DualLoRAError
from duallora.storage.regular import open_regular
from duallora.streams.collection import Collection, Part
from duallora.streams.listed import Labelled, ListedImages
from duallora.streams.names import normal
from duallora.streams.split_folders import role
from duallora.streams.table_paths import TablePaths

_COLUMNS = ("path", "label", "split", "domain")
_NEEDED = ("path", "label")


@dataclass(frozen=True)
class _Row:
    """One line: where its image lies, and the part of the data set that it is of."""

    file: Path
    label: str
    part: Literal["train", "val", "test"]
    domain: str


def read_table(path: Path) -> Collection:
    """Reads a table with the header ``path,label`` and perhaps ``split`` and ``domain``, in any order.

    Paths count from the table's folder. Without ``split``, or where no row is a test image, every fifth image
    of a class is one. Domains come in the order in which they first appear.

    Raises:
        DualLoRAError: the table cannot be read, a row says too little, or an image is missing or comes twice.
    """
    rows = _rows(path)
    domains = list(dict.fromkeys(row.domain for row in rows.values()))
    tested = any(row.part != "train" for row in rows.values())
    parts = []
    for domain in domains:
        own = {key: row for key, row in rows.items() if row.domain == domain}
        train, test = (_images(path, own, train=train) for train in (True, False))
        parts.append(Part(domain, train, test if tested else None))
    return Collection(path.stem, tuple(parts))


def _images(path: Path, rows: dict[str, _Row], *, train: bool) -> ListedImages:
    chosen = {key: row for key, row in rows.items() if (row.part == "train") == train}
    listed: list[Labelled] = [(key, row.label) for key, row in chosen.items()]
    return ListedImages(path.parent, listed, {key: row.file for key, row in chosen.items()})


def _rows(path: Path) -> dict[str, _Row]:
    """The rows by their path as it is shown."""
    lines = []
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            _check_header(path, header)
            for row in reader:
                where = f"line {reader.line_num} of {path}"
                lines.append((where, _cells(row, where, header)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DualLoRAError(f"{path} cannot be read as a CSV file: save it as UTF-8 text") from error
    if not lines:
        raise DualLoRAError(f"{path} names no image: write one path and label a line")
    rows = _placed(path, lines)
    used = {row.part for row in rows.values()} - {"train"}
    if len(used) > 1:
        raise DualLoRAError(
            f"{path} has images of both test and val: the images to test on are one set, leave the others "
            "out or call them train"
        )
    return rows


def _placed(path: Path, lines: list[tuple[str, dict[str, str]]]) -> dict[str, _Row]:
    """The rows with their files.

    Raises:
        DualLoRAError: a file is not there, or two rows mean the same one.
    """
    places = TablePaths(path.parent)
    rows: dict[str, _Row] = {}
    first: dict[str, str] = {}
    missing = []
    for where, cells in lines:
        found = places.find(cells["path"])
        if found is None:
            missing.append(cells["path"])
            continue
        shown, file = found
        identity = places.identity(file)
        if identity in first or shown in rows:
            earlier = first.get(identity, shown)
            also = "" if earlier == shown else f", which is {earlier},"
            label, other = cells["label"], rows[earlier].label
            labels = "" if label == other else f", as {label} and as {other}, and an image has one label here"
            raise DualLoRAError(
                f"{where} names {shown}{also} a second time{labels}: leave one of the lines out"
            )
        first[identity] = shown
        rows[shown] = _Row(file, cells["label"], role(cells["split"]) or "train", cells["domain"])
    if missing:
        raise DualLoRAError(
            f"{path} names {len(missing)} of {len(lines)} images that are not in {path.parent}, the first is "
            f"{missing[0]}: write paths as they lead on from that folder, with / between folders"
        )
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    if not set(_NEEDED) <= set(header) <= set(_COLUMNS) or len(set(header)) < len(header):
        raise DualLoRAError(
            f"the first line of {path} is {','.join(header) or 'empty'}: it must be path,label and may go on "
            "with split and domain"
        )


def _cells(row: dict[str, str | None], where: str, header: list[str]) -> dict[str, str]:
    if None in row or None in row.values():
        raise DualLoRAError(f"{where} has not {len(header)} fields as the header: put quotes around commas")
    # The path is looked up as it is written.
    raw = {name: row.get(name) or "" for name in _COLUMNS}
    cells = {name: text.strip() if name == "path" else normal(text) for name, text in raw.items()}
    for name in [*_NEEDED, *(["domain"] if "domain" in header else [])]:
        if not cells[name]:
            raise DualLoRAError(f"{where} has no {name}: fill it in or remove the line")
    if cells["split"] and role(cells["split"]) is None:
        raise DualLoRAError(f"{where} has the split {cells['split']!r}: it must be train, test or val")
    return cells
