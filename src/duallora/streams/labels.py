"""One image, one label: the same picture under two names of classes is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.copies import Hash, read_once, size_of

Labelled = tuple[Path | None, str]
"""The file of an image, None where it has none, and the name of its class."""


def refuse_two_labels(images: Iterable[Labelled], hash_of: Hash | None = None) -> None:
    """Refuses images that are byte for byte alike and have different labels.

    A learner gives an image one class: with two labels, one of them is taught as wrong.

    Args:
        images: of all parts of a data set.
        hash_of: of a file, where one is shared with :func:`.warn_of_copies`; see :func:`.read_once`.

    Raises:
        DualLoRAError: naming how many there are, the first two files and their labels.
    """
    found = two_labels(images, hash_of or read_once())
    if not found:
        return
    (one, label), (other, second) = found[0]
    count = "1 image has" if len(found) == 1 else f"{len(found):,} images have"
    alike = "" if one == other else f" and, byte for byte the same, {other}"
    raise DualLoRAError(
        f"{count} two labels, the first is {one}{alike}, which is called {label} and {second}: an image has "
        "one label here, take it out of one of the two classes"
    )


def two_labels(images: Iterable[Labelled], hash_of: Hash) -> list[tuple[tuple[Path, str], tuple[Path, str]]]:
    """Images that have the bytes of an earlier one and another label, each with the first such.

    Only files of equal size and different labels are read.
    """
    by_size: dict[int, dict[Path, str]] = defaultdict(dict)
    found = []
    for path, label in images:
        size = 0 if path is None else size_of(path)
        if path is None or not size:
            continue
        if by_size[size].setdefault(path, label) != label:
            found.append(((path, by_size[size][path]), (path, label)))
    for alike in by_size.values():
        if len(set(alike.values())) < 2:
            continue
        first: dict[str, tuple[Path, str]] = {}
        for path, label in alike.items():
            earlier = first.setdefault(hash_of(path), (path, label))
            if earlier[1] != label:
                found.append((earlier, (path, label)))
    return found
