"""A point of feature space for every class row."""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.classifiers.class_statistics import ByRow


class Prototypes(ByRow):
    """A point for every row (R, d), fp32, on the CPU.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(0, dim))

    def add(self, mean: Tensor) -> None:
        """Adds the rows of a task (k, d)."""
        self.mean = torch.cat([self.mean, mean.float().cpu()])

    def forget(self, kept: Tensor) -> None:
        """Loses rows; ``kept`` (R,), bool, says which stay."""
        self.mean = self.mean[kept]

    def simulate(self, rows: int) -> None:
        """So many rows that all lie in one direction, for measurements."""
        self.mean = torch.ones(rows, self.mean.shape[1])
