"""All files below a folder, links to folders followed without running in circles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk(
    folder: Path, wanted: Callable[[str], bool], fail: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str]]]:
    """Goes through a folder and all below it; every real folder comes once, under its own path if it has one.

    A link to a folder that holds the walk's beginning, or the linked folder that it lies in, would lead in a
    circle and adds nothing.

    Args:
        folder: where to begin.
        wanted: whether a folder of that name is gone into.
        fail: gets the error of a folder that cannot be read.

    Yields:
        Every folder's path and the names of the files in it.
    """
    seen: set[str] = set()
    # Where to start, and the linked folders that this start lies in.
    waiting: list[tuple[str, tuple[Path, ...]]] = [(str(folder), ())]
    while waiting:
        start, chain = waiting.pop(0)
        real = Path(start).resolve()
        if str(real) in seen or any(each.is_relative_to(real) for each in chain):
            continue
        links: list[str] = []
        for parent, folders, files in os.walk(start, onerror=fail):
            place = os.path.realpath(parent)
            if place in seen:  # a linked folder may hold one that has been gone through
                folders.clear()
                continue
            seen.add(place)
            inside = [name for name in folders if wanted(name)]
            links += [path for name in inside if os.path.islink(path := f"{parent}/{name}")]  # noqa: PTH114
            folders[:] = inside
            yield parent, files
        waiting += [(link, (*chain, real)) for link in sorted(links)]
