"""Which epoch of a training is kept: the one that names the most held-back images rightly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOOKS = 10  # most times that held-back images are looked at in a task
_CHANCE = 1  # images more than after the last epoch that say nothing


class BestEpoch:
    """Notes how many held-back images are right after an epoch, and puts the best one's parameters back.

    The learning rates fall towards the end, so the last epoch is kept unless an earlier one had at least two
    images more right: one more is chance.

    Args:
        parameters: what is trained.
        epochs: of the training.
    """

    def __init__(self, parameters: Sequence[Tensor], epochs: int) -> None:
        self._parameters, self.epochs = parameters, epochs
        self._every = math.ceil(epochs / _LOOKS)
        self._best: tuple[int, int, list[Tensor]] | None = None  # right, epoch, parameters
        self._last = (0, 0)  # right, epoch

    def due(self, epoch: int) -> bool:
        """Whether to look after this epoch, from 1: after the last one, and at most ten times in all."""
        return epoch == self.epochs or (self.epochs - epoch) % self._every == 0

    def note(self, epoch: int, right: int) -> None:
        """Notes that so many images were right after an epoch, from 1."""
        self._last = right, epoch
        if epoch < self.epochs and (self._best is None or right >= self._best[0]):
            self._best = right, epoch, [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> tuple[int, int]:
        """Puts the parameters of the best epoch back, bit for bit; gives that epoch and its right images."""
        right, epoch = self._last
        if self._best is not None and self._best[0] > right + _CHANCE:
            right, epoch, parameters = self._best
            for parameter, kept in zip(self._parameters, parameters, strict=True):
                parameter.copy_(kept)
        return epoch, right
