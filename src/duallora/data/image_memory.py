"""Memory for prepared images that this process shares with its forks."""

from __future__ import annotations

import mmap
import multiprocessing
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
RegionName = Literal["run", "task"]

_ALIGNED = 64  # what is kept begins at a multiple of it
_NOTES = 2**26  # bytes beside the images: tables of what is kept, and data sets as workers get them


class ImageMemory:
    """Two regions of anonymous memory: for images of a whole run, and for those of the task at hand.

    Forks made later see what any of them writes. Pages count as used only once something was written to
    them: an image memory that nobody fills costs nothing.

    Args:
        size: bytes for images, half of them in each region. Where the system does not grant so many, the
            regions are smaller.
    """

    def __init__(self, size: int) -> None:
        images = max(size // 2, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        while True:
            try:
                mapped = mmap.mmap(-1, 2 * (images + _NOTES))
                break
            except (OSError, OverflowError, ValueError):
                if not images:
                    raise
                images = images // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        self._regions: dict[RegionName, Region] = {
            "run": Region(mapped, 0, images),
            "task": Region(mapped, images + _NOTES, images),
        }

    def __getitem__(self, name: RegionName) -> Region:
        return self._regions[name]


class Region:
    """A part of the memory that is filled from its start and emptied as a whole.

    Args:
        mapped: the memory.
        start: where the region begins, a multiple of the page size.
        images: how many bytes of images fit.
    """

    def __init__(self, mapped: mmap.mmap, start: int, images: int) -> None:
        self._map, self._start, self._images, self._users = mapped, start, images, 0
        self._all: Bytes = np.frombuffer(mapped, np.uint8)[start : start + images + _NOTES]
        # Behind the last byte taken, and bytes of images among those: written by every process.
        self._counts = self._all[:_ALIGNED].view(np.int64)
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if "fork" in methods else None)
        self._lock = context.Lock()
        self._clear()

    @property
    def image_bytes(self) -> int:
        """Bytes of images that are kept."""
        return int(self._counts[1])

    def take(self, size: int, *, image: bool) -> int | None:
        """Where so many bytes lie that nobody else has, or None where there is no room.

        Args:
            size: bytes.
            image: whether they are an image's; the room for those is limited.
        """
        with self._lock:
            begin = -(-int(self._counts[0]) // _ALIGNED) * _ALIGNED
            full = image and int(self._counts[1]) + size > self._images
            if full or begin + size > len(self._all):
                return None
            self._counts[0] = begin + size
            self._counts[1] += size if image else 0
        return begin

    def at(self, place: int, size: int) -> Bytes:
        """The bytes at a place that was taken."""
        return self._all[place : place + size]

    def enter(self) -> None:
        """Somebody keeps things here from now on."""
        self._users += 1

    def leave(self) -> None:
        """Somebody needs nothing here any more; after the last one the region is empty."""
        self._users -= 1
        if self._users:
            return
        used = -(-int(self._counts[0]) // mmap.PAGESIZE) * mmap.PAGESIZE
        with suppress(AttributeError, OSError):  # Linux takes the pages back at once
            self._map.madvise(mmap.MADV_REMOVE, self._start, used)
        self._clear()

    def _clear(self) -> None:
        self._counts[:2] = (_ALIGNED, 0)
