"""The same picture to learn from and to test on: files that are byte for byte alike."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.storage.atomic import sha256_of

Hash = Callable[[Path], str]
"""What files of the same bytes have in common, and no other has."""


def warn_of_copies(train: Iterable[Path | None], test: Iterable[Path | None], hash_of: Hash) -> None:
    """Counts test images that are also training images under another name, and says so in one warning.

    Only files of equal size are read.

    Args:
        train: files to learn from; None for images that come from no file.
        test: files to test on.
        hash_of: of a file, from :func:`read_once`; that of :func:`.refuse_two_labels`.
    """
    found = copies(train, test, hash_of)
    if found:
        told = "1 image to test on is" if len(found) == 1 else f"{len(found):,} images to test on are"
        first, twin = found[0]
        warnings.warn(
            f"{told} byte for byte also among those to learn from, the first is {first}, which is {twin}: "
            "what is measured on them says nothing of new images, take them out of one of the two",
            stacklevel=2,
        )


def copies(
    train: Iterable[Path | None], test: Iterable[Path | None], hash_of: Hash
) -> list[tuple[Path, Path]]:
    """The test files that have the bytes of a training file, each with the first of those."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(train):
        if path is not None and (size := size_of(path)):
            sizes[size].append(path)
    digests: dict[int, dict[str, Path]] = {}
    found = []
    for path in dict.fromkeys(test):
        size = 0 if path is None else size_of(path)
        if path is None or size not in sizes:
            continue
        if size not in digests:
            digests[size] = {hash_of(twin): twin for twin in reversed(sizes[size])}
        twin = digests[size].get(hash_of(path))
        if twin is not None:
            found.append((path, twin))
    return found


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none to read."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a million times
    except OSError:
        return 0  # whoever reads it says so


def read_once() -> Hash:
    """Hashes of files, each of which is read once however often it is asked for."""
    return cache(_hash)


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except (DualLoRAError, OSError):
        return os.urandom(32).hex()  # is like no other
