"""A known domain's next task: its residual adapter goes on learning, and class rows follow the features.

::

    task 1 of a domain    R learns freely                        rows 1
    task 2                R goes on, moves of features are paid  rows 1 follow, rows 2
    task 3                R goes on, moves of features are paid  rows 1 and 2 follow, rows 3

What the first classes of a domain teach is not all that its later classes need. But rows of earlier tasks
were made of features that training now moves, and their images are gone. So the training pays for every move
(:meth:`Continuation.moved`), and afterwards old rows follow the moves that the new images made
(:meth:`Continuation.follow`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from duallora.classifiers.class_statistics import ClassStatistics
from duallora.methods.drift import affine_map

CONTINUED_RATE = 0.25
"""Learning rate of a residual adapter that goes on learning, over that of the orthogonal one."""

DISTANCE_WEIGHT = 1.0
"""Of the distance that features have moved, in the loss."""


@dataclass(frozen=True)
class Continuation:
    """Where features were before the task.

    Attributes:
        before: features of the task's images (n, row_dim).
        spread: standard deviation inside classes of those of them that adapters can move (width,).
    """

    before: Tensor
    spread: Tensor

    @classmethod
    def of(cls, rows: ClassStatistics, before: Tensor, width: int) -> Continuation:
        """For a task whose rows, as they are before its training, are the latest.

        Args:
            rows: of all tasks.
            before: features of the task's images (n, row_dim).
            width: the first so many of them come from above the adapters.
        """
        variance = rows.moments.scatter.diagonal()[:width] / max(rows.freedom, 1.0)
        smallest = max(1e-3 * float(variance.mean()), 1e-6)  # a dead feature has no spread at all
        return cls(before, variance.clamp(min=smallest).sqrt().float().to(before.device))

    def moved(self, before: Tensor, now: Tensor) -> Tensor:
        """What the loss pays for the distance between features (n, row_dim) of the same views.

        Features are distilled as they are, not what heads say of them: rows are made of features.
        """
        width = len(self.spread)
        return DISTANCE_WEIGHT * ((now - before)[:, :width] / self.spread).square().mean()

    def follow(self, rows: ClassStatistics, after: Tensor, tasks: Collection[int]) -> None:
        """Moves rows of earlier tasks by the affine map that the task's images followed.

        The means of the rows move, and the scatter that all tasks share moves as far as these rows have a
        share in it.

        Args:
            rows: changed in place; those of the task itself are the latest.
            after: features of the same images (n, row_dim) after the training.
            tasks: whose rows lie where this adapter acts.
        """
        width, mean, count = len(self.spread), rows.moments.mean.clone(), rows.moments.count
        mine = torch.isin(rows.task, torch.tensor(sorted(tasks), dtype=torch.long))
        found = affine_map(self.before[:, :width], after[:, :width])
        mean[mine, :width] = found(mean[mine, :width])
        earlier = rows.task < rows.task[-1]
        share = float((count[mine] - 1).sum() / (count[earlier] - 1).sum().clamp(min=1))
        drift = torch.eye(mean.shape[1], dtype=mean.dtype)
        drift[:width, :width] += share * found.slope
        rows.move(drift, mean)
