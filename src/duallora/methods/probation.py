"""A domain keeps its adapters only if they help with images that they were not trained on.

Nothing in a first task says whether what its few classes teach carries over. The next task of the domain
does: its classes are new to the adapters. So its images are looked at with and without them, and where they
are told apart better without, the adapters go, and rows of the first task are again what they were before
its training. Until then these are kept beside the rows, while no other domain has opened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.storage.learned import Groups


class Probation(Groups):
    """Rows as they were before their task's training, of a first domain while it has one task.

    Means (k, d), losses and distances, and what the scatter (d, d) lacks to be that of before.

    Args:
        device: of loaded ones.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("mean", "fit", "scatter", device=device)

    def begin(self, rows: ClassStatistics, task: int) -> None:
        """Notes the rows of a task before its training; they are the latest."""
        self.put(task, rows.mean[rows.task == task].clone(), rows.fit[task].clone(), rows.latest_scatter)

    def trained(self, rows: ClassStatistics, task: int) -> None:
        """After its training: of the scatter only the difference is of use later."""
        if task in self:
            mean, fit, scatter = self[task]
            self.put(task, mean, fit, (scatter - rows.latest_scatter).float())

    def restore(self, rows: ClassStatistics, task: int) -> None:
        """Gives a task the rows that it had before its training; they are noted no longer."""
        mean, fit, scatter = self[task]
        rows.exchange(task, mean, fit, scatter.double())
        self.discard(task)

    def forget(self, task: int, kept: Tensor) -> None:
        """Loses rows of a task; ``kept`` (k,), bool, says which stay."""
        if task in self and bool(kept.any()):
            mean, fit, scatter = self[task]
            self.put(task, mean[kept.cpu()], fit, scatter)
        else:
            self.discard(task)


def loss_of_unseen(features: Tensor, labels: Tensor, classes: int) -> float:
    """How badly images name their classes by rows of the others: the leave-one-out loss of the best kappa.

    Args:
        features: (n, d).
        labels: (n,).
        classes: of the task.
    """
    rows = ClassStatistics(features.shape[1], features.device)
    rows.replace(0, ClassMoments.of(features, labels, classes))
    rows.fit_temperature(0, features, labels)
    return float(rows.losses[0].min())
