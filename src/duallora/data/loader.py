"""Batches of prepared images: decoded once, in parallel, ahead of the model, and kept for the next pass."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from duallora.data.assembly import Assembly, Chunk, piece_of
from duallora.data.image_memory import ImageMemory, RegionName
from duallora.data.source import Keep, Samples, Source
from duallora.data.transforms import Augmentation, EvaluationTransform
from duallora.data.workers import Library, Workers

START_WORTH = 0.3
"""Seconds of work from which on workers are started; what takes less is done where it is needed."""

SEND_WORTH = 0.01
"""The same where they run already."""

CHEAP = 1.5e-4
"""Seconds of an image below which workers that take turns with the model would save nothing."""


class ImageLoader:
    """Gives batches of a data set's images on a device.

    What a batch is depends on neither the workers nor on what is kept: views are made of single images, and
    draws are keyed by the sample.

    Args:
        device: where batches are wanted.
        workers: processes that prepare images; 0 for none.
        image_bytes: memory for prepared images; what does not fit is prepared again.

    Attributes:
        ahead: images that are prepared before they are asked for, beside the batch that is. Beside a model on
            the CPU none: it and the workers would take the cores from each other.
        started: processes started so far.
    """

    def __init__(self, device: torch.device, workers: int, image_bytes: int) -> None:
        self.device, self.started = device, 0
        self.ahead = 0 if device.type == "cpu" else 256
        self._count, self._image_bytes = workers, image_bytes
        self._library: Library | None = None
        self._workers: Workers | None = None
        self._next = 0
        self._passing, self._opening = threading.Lock(), threading.RLock()

    @contextmanager
    def reading(
        self,
        samples: Samples,
        evaluation: EvaluationTransform,
        augmentation: Augmentation | None = None,
        *,
        keep: Keep = "nothing",
        region: RegionName = "task",
    ) -> Iterator[Source]:
        """Opens a data set; what is kept of it is gone at the end.

        Args:
            samples: the data set. Where it is open already, inside that, the same source is given.
            evaluation: view without an epoch.
            augmentation: view in an epoch.
            keep: what is kept of it, as far as there is room.
            region: where it is kept.
        """
        with self._opening:
            found = self._found(samples, evaluation, augmentation)
            number, source = (
                self._open(samples, evaluation, augmentation, keep, region) if found is None else found
            )
        try:
            yield source
        finally:
            if found is None:
                with self._opening:
                    self._close(number)

    def batches(self, source: Source, chunks: Iterable[Chunk], total: int) -> Generator[Tensor, None, None]:
        """Batches (B, 3, height, width), normalised, fp32, on the device.

        One pass at a time has the workers; one inside another, or in another thread, does without.

        Args:
            source: an open data set.
            chunks: what the batches hold.
            total: images in all chunks together.

        Raises:
            DualLoRAError: an image cannot be read; the first one in the order of the chunks is named.
        """
        mine = self._passing.acquire(blocking=False)
        try:
            for pixels in self._views(source, iter(chunks), total if mine else None):
                yield source.evaluation.normalized(pixels.to(self.device, non_blocking=True))
        finally:
            if mine:
                self._passing.release()

    def sent(self, numbers: Sequence[int]) -> Tensor:
        """Whole numbers (n,) on the device; a GPU is not waited for."""
        pinned = self.device.type == "cuda"
        return torch.tensor(numbers, pin_memory=pinned).to(self.device, non_blocking=True)

    def close(self) -> None:
        """Ends the workers; they are started again when they are needed."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    # -- open data sets --------------------------------------------------------------------------------------

    def _found(
        self, samples: Samples, evaluation: EvaluationTransform, augmentation: Augmentation | None
    ) -> tuple[int, Source] | None:
        for number, source in () if self._library is None else self._library.sources.items():
            fits = augmentation is None or source.augmentation == augmentation
            if source.samples is samples and source.evaluation is evaluation and fits:
                return number, source
        return None

    def _open(
        self,
        samples: Samples,
        evaluation: EvaluationTransform,
        augmentation: Augmentation | None,
        keep: Keep,
        region: RegionName,
    ) -> tuple[int, Source]:
        if self._library is None:
            self._library = Library(ImageMemory(self._image_bytes), {}, {})
        library, number = self._library, self._next
        self._next += 1
        library.memory[region].enter()
        source = Source(samples, evaluation, augmentation, keep, library.memory[region])
        library.sources[number], library.regions[number] = source, region
        return number, source

    def _close(self, number: int) -> None:
        library = self._library
        if library is None:
            return
        if self._workers is not None and self._workers.reads(number):
            self._give_up(self._workers)  # nobody may write into what is given back
        del library.sources[number]
        library.memory[library.regions.pop(number)].leave()

    # -- one pass --------------------------------------------------------------------------------------------

    def _views(self, source: Source, chunks: Iterator[Chunk], total: int | None) -> Iterator[Tensor]:
        """Views (B, height, width, 3) of the chunks, made here until workers are known to be worth it.

        Without a total it is a pass that may have no workers: another one has them.
        """
        last, done = math.inf, 0
        for chunk in chunks:
            pixels = self._empty(source, chunk)
            for row, position in enumerate(chunk.positions):
                start = time.perf_counter()
                source.write(position, chunk.epoch, pixels[row].numpy())
                took, done = time.perf_counter() - start, done + 1
                # The first image takes longer than others: its decoder is imported.
                seconds, last = min(took, last), took
                if total is None or not self._count or done < 2:
                    continue
                if self._worth(seconds, total - done):
                    yield from self._ahead(source, chunk, row + 1, pixels, chunks, seconds)
                    return
            yield pixels

    def _worth(self, seconds: float, images: int) -> bool:
        """Whether workers are worth it for so many images of so many seconds each."""
        if not self.ahead and seconds < CHEAP:
            return False
        return seconds * images > (START_WORTH if self._workers is None else SEND_WORTH)

    def _ahead(
        self, source: Source, first: Chunk, row: int, begun: Tensor, chunks: Iterator[Chunk], seconds: float
    ) -> Iterator[Tensor]:
        """Views of the chunks, made by workers ahead of need.

        Args:
            source: what is read.
            first: a chunk that is begun.
            row: how many of its views are there.
            begun: its views (B, height, width, 3).
            chunks: those behind it.
            seconds: that an image takes.
        """
        number, workers = self._ready(source)
        try:
            workers.begin()
            assembly = Assembly(workers, number, piece_of(seconds), self.ahead)
            assembly.add(first, begun, row)
            more = True
            while True:
                while more and assembly.has_room:
                    chunk = next(chunks, None)
                    more = chunk is not None
                    if chunk is not None:
                        assembly.add(chunk, self._empty(source, chunk))
                if not assembly:
                    return
                yield assembly.take()
        except (KeyboardInterrupt, SystemExit):
            # A signal may have come between two lines: nobody knows what is under way, and waiting for what
            # has come already would never end.
            self.close()
            raise
        finally:  # nothing is under way at the end of a whole pass
            if self._workers is workers:
                self._give_up(workers)

    def _give_up(self, workers: Workers) -> None:
        """Waits for what is under way, which nobody needs; ends workers that cannot be reached."""
        try:
            workers.begin()
        except BaseException:
            self.close()
            raise

    def _ready(self, source: Source) -> tuple[int, Workers]:
        """The number of an open source, and workers that know it."""
        library = self._library
        if library is None:
            raise ValueError("the data set was opened by another loader")
        number = next(n for n, each in list(library.sources.items()) if each is source)
        height, width, channels = source.shape
        workers = self._workers
        if workers is None or workers.view < height * width * channels or not workers.learn_of(number):
            self.close()
            workers = self._workers = Workers(self._count, library, height * width * channels)
            self.started += self._count
        return number, workers

    def _empty(self, source: Source, chunk: Chunk) -> Tensor:
        """Where the views of a chunk go; from pinned memory a copy to a GPU does not stop the model."""
        pinned = self.device.type == "cuda"
        return torch.empty(len(chunk.positions), *source.shape, dtype=torch.uint8, pin_memory=pinned)
