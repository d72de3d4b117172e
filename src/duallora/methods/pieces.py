"""A batch in as few pieces as the memory holds, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from duallora.errors import is_low_memory
from duallora.methods.interface import Batch
from duallora.runtime import parallel

Shares = Sequence[tuple[Batch, float]]
"""What is computed of a batch, piece by piece, with each piece's share of the whole."""

T = TypeVar("T")


class Pieces:
    """Computes batches whole, and in twice as many pieces whenever the memory does not hold them.

    The step is the same: its gradient is the sum over the pieces, each with its share.

    Args:
        tries: whether to try smaller pieces; else the error of the memory is the caller's.

    Attributes:
        most: images of the largest piece that is tried next; None until one was too large.
    """

    def __init__(self, tries: bool) -> None:
        self.tries = tries
        self.most: int | None = None

    def run(self, drawn: Shares, compute: Callable[[Shares], T]) -> T:
        """Computes a batch, again from its beginning where the memory did not hold a piece.

        Args:
            drawn: the batch, perhaps in pieces already.
            compute: computes the pieces; it is called afresh with smaller ones.

        Raises:
            Exception: of ``compute``; of the memory only where single images do not fit or nothing is tried.
        """
        while True:
            pieces = [part for batch, share in drawn for part in self._parts(batch, share)]
            try:
                return compute(pieces)
            except Exception as error:
                largest = max(len(batch.labels) for batch, _ in pieces)
                if not self.tries or largest < 2 or not is_low_memory(error):
                    raise
                self.most = math.ceil(largest / 2)
            # Outside of the handler: the error keeps what was computed alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _parts(self, batch: Batch, share: float) -> list[tuple[Batch, float]]:
        images = len(batch.labels)
        count = 1 if self.most is None else math.ceil(images / self.most)
        if count == 1:
            return [(batch, share)]
        blocks = [parallel.block(images, part, count) for part in range(count)]
        return [(Batch(*(part[b.start : b.stop] for part in batch)), share * len(b) / images) for b in blocks]
