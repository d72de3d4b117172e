"""Weights of classes in the loss of a task whose classes have unequal numbers of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

UNEVEN = 3.0
"""Largest count over the smallest from which on classes are weighted."""


def balanced(targets: Sequence[int], classes: int) -> Tensor | None:
    """Weights (classes,) with which all classes count the same, of mean 1 over the images.

    Args:
        targets: class of every image.
        classes: how many there are.

    Returns:
        ``n / (classes n_c)``; None where no class has more than three times the images of another.
    """
    counts = torch.bincount(torch.tensor(targets), minlength=classes).float()
    present = counts > 0
    if not bool(present.any()) or counts.max() <= UNEVEN * counts[present].min():
        return None
    return counts.sum() / (present.sum() * counts.clamp(min=1))


class ClassLoss:
    """The mean over images in the loss of every method.

    Attributes:
        weights: of the classes of the task that is trained (|Y_t|,), of mean 1 over its images; None where
            all count the same.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy () of logits (n, |Y_t|)."""
        if self.weights is None:
            return F.cross_entropy(logits, labels)
        return self.mean(F.cross_entropy(logits, labels, reduction="none"), labels)

    def mean(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Mean () of the images' losses (n,).

        Not divided by the weights that happen to be in a batch: shares of it have to add up to the whole.
        """
        return (losses if self.weights is None else losses * self.weights[labels]).mean()
