"""Batches that are put together from pieces in the order in which they were asked for."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from duallora.data.workers import PIECE, Done, Piece, Workers

_PIECE_SECONDS = 0.004  # so long takes a piece at least: handing it over costs a twentieth of that


class Chunk(NamedTuple):
    """The images of a batch.

    Attributes:
        positions: in the data set.
        epoch: in which they are seen, or None for the evaluation view.
    """

    positions: tuple[int, ...]
    epoch: int | None = None


@dataclass
class _Batch:
    """A batch that is not whole yet.

    Attributes:
        pixels: its views (n, height, width, 3).
        images: that workers make.
        missing: of them, those that are not there yet.
        row: of the first image that could not be read.
        error: why.
    """

    pixels: Tensor
    images: int
    missing: int
    row: int = 0
    error: Exception | None = None


class Assembly:
    """Hands pieces to workers and gives whole batches, in order.

    Args:
        workers: who makes the pieces.
        source: number of the data set.
        piece: images of a piece.
        ahead: images that are prepared before they are asked for, beside the batch that is.
    """

    def __init__(self, workers: Workers, source: int, piece: int, ahead: int) -> None:
        self._workers, self._source, self._piece, self._most = workers, source, piece, ahead
        self._waiting: deque[Piece] = deque()
        self._batches: deque[_Batch] = deque()
        self._first = self._ahead = 0  # number of the first batch here, and images behind it

    @property
    def has_room(self) -> bool:
        """Whether another batch can be prepared already."""
        return not self._batches or self._ahead < self._most

    def __bool__(self) -> bool:
        return bool(self._batches)

    def add(self, chunk: Chunk, pixels: Tensor, row: int = 0) -> None:
        """Puts a batch at the end.

        Args:
            chunk: what it holds.
            pixels: where its views go (n, height, width, 3).
            row: the views before it are there.
        """
        number = self._first + len(self._batches)
        for start in range(row, len(chunk.positions), self._piece):
            part = chunk.positions[start : start + self._piece]
            self._waiting.append(Piece(number, start, self._source, chunk.epoch, part))
        missing = len(chunk.positions) - row
        self._batches.append(_Batch(pixels, missing, missing))
        self._ahead += missing
        self._submit()

    def take(self) -> Tensor:
        """The first batch, once it is whole.

        Raises:
            Exception: what reading the first of its images that cannot be read has raised.
        """
        batch = self._batches[0]
        self._receive(block=False)
        while batch.missing:
            self._receive(block=True)
        self._batches.popleft()
        self._first += 1
        self._ahead -= batch.images
        if batch.error is not None:
            raise batch.error
        return batch.pixels

    def _submit(self) -> None:
        while self._waiting and self._workers.submit(self._waiting[0]):
            self._waiting.popleft()

    def _receive(self, *, block: bool) -> None:
        for done in self._workers.receive(block=block):
            self._put(done)
        self._submit()

    def _put(self, done: Done) -> None:
        piece = done.piece
        batch = self._batches[piece.chunk - self._first]
        batch.missing -= len(piece.positions)
        batch.pixels[piece.row : piece.row + len(piece.positions)].numpy()[:] = done.pixels
        row = piece.row + done.row
        if done.error is not None and (batch.error is None or row < batch.row):
            batch.row, batch.error = row, done.error


def piece_of(seconds: float) -> int:
    """Images of a piece: as few as are worth it, so that all workers end at about the same time.

    Args:
        seconds: that an image takes.
    """
    return max(1, min(PIECE, math.ceil(_PIECE_SECONDS / max(seconds, 1e-6))))
