"""Decoded images kept in memory, as far as they fit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from duallora.streams.task import TaskDataset

_AT_ONCE = 256  # images that threads decode before it is asked whether there is room for more
_ONE_BYTE = ("1", "L", "P")  # modes that Pillow keeps at one byte a pixel; the others it pads to four


class Memory:
    """A number of bytes that several data sets share.

    Args:
        size: Bytes.
    """

    def __init__(self, size: int) -> None:
        self.free = size

    def take(self, size: int) -> bool:
        """Whether so many bytes were left; they are taken then."""
        if size > self.free:
            return False
        self.free -= size
        return True


class KeptImages(Dataset[tuple[Any, int]]):
    """A data set that keeps images in memory after their first use, as long as there is room.

    Args:
        dataset: Images that are read more than once.
        memory: Where they are kept; what does not fit is decoded again.
    """

    def __init__(self, dataset: Dataset[Any], memory: Memory) -> None:
        self._dataset, self._memory = dataset, memory
        self._kept: dict[int, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        found = self._kept.get(index)
        if found is not None:
            return found
        sample = self._read(index)
        if get_worker_info() is None:  # what a worker keeps, it keeps beside the others, and for one pass
            self._keep(index, sample)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """Without the images: a worker that is not a fork would get a copy of all of them in every pass."""
        return self.__dict__ | {"_kept": {}}

    def fill(self, positions: Sequence[int], threads: int) -> None:
        """Decodes images now: workers that are forks share what is there when they start, and keep nothing.

        It ends with the first image that does not fit.
        """
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(positions), _AT_ONCE):
                part = positions[start : start + _AT_ONCE]
                for index, sample in zip(part, pool.map(self._read, part), strict=True):
                    if not self._keep(index, sample):
                        return

    def _read(self, index: int) -> tuple[Any, int]:
        sample: tuple[Any, int] = self._dataset[index]
        return sample

    def _keep(self, index: int, sample: tuple[Any, int]) -> bool:
        """Keeps an image where there is room; whether there was."""
        if not self._memory.take(_bytes(sample[0])):
            return False
        self._kept[index] = sample
        return True


def keeping(
    dataset: TaskDataset, memory: Memory, workers: int = 0, positions: Sequence[int] = ()
) -> TaskDataset:
    """The same data set, its images kept in memory.

    Args:
        dataset: A task's images.
        memory: Where they are kept.
        workers: Processes that will read it; where they are forks, it is filled at once for them.
        positions: What is read, what comes first being kept first.
    """
    kept = KeptImages(dataset, memory)
    if workers and multiprocessing.get_start_method() == "fork":
        kept.fill(positions, workers)
    return TaskDataset(
        kept,
        range(len(dataset)),
        classes=dataset.classes,
        targets=dataset.targets,
        identifiers=dataset.identifiers,
    )


def _bytes(image: Any) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height * (1 if image.mode in _ONE_BYTE else 4)
    return int(image.numel() * image.element_size())
