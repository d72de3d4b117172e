"""A domain keeps its adapters unless they harm images that they were not trained on.

Nothing in a first task says whether what its few classes teach carries over. The next task of the domain
does: its classes are new to the adapters. So its images are looked at with and without them, and where they
are told apart better without, by more than chance, the adapters go, and rows of the first task are again what
they were before its training. Until then these are kept beside the rows, while no other domain has opened.
"""

from __future__ import annotations

import math

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


def harmed(adapted: Tensor, plain: Tensor, labels: Tensor, classes: int) -> bool:
    """Whether adapters make images of new classes harder to tell apart, by more than a standard error.

    In doubt they stay: where they help they help by many points, and where they do not they cost one or two.

    Args:
        adapted: features (n, d) with the adapters.
        plain: features (n, d) of the same images without them.
        labels: (n,).
        classes: of the task.
    """
    harm = losses_of_unseen(adapted, labels, classes) - losses_of_unseen(plain, labels, classes)
    return len(harm) > 1 and float(harm.mean()) > float(harm.std()) / math.sqrt(len(harm))


def losses_of_unseen(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How badly images name their classes by rows of the others: leave-one-out losses at the best kappa.

    Args:
        features: (n, d).
        labels: (n,).
        classes: of the task.

    Returns:
        (n',), fp64: an image that is the only one of its class has none.
    """
    rows = ClassStatistics(features.shape[1], features.device)
    rows.replace(0, ClassMoments.of(features, labels, classes))
    own = rows.own(0, labels, features)
    losses = torch.stack(rows.left_out_losses(features, own))[:, rows.counted(own)]
    return losses[losses.sum(1).argmin()]
