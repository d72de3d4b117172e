"""What SSIAT and RSIAT share: cosine heads, and Gaussians of old classes that follow the features' shift."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.classifiers.alignment import Gaussians, aged, refit
from duallora.classifiers.class_statistics import ClassStatistics
from duallora.classifiers.cosine import cosines
from duallora.classifiers.heads import Heads
from duallora.methods.drift import semantic_shift
from duallora.methods.interface import Loader, TaskInfo

if TYPE_CHECKING:
    from duallora.methods.base import Method


@dataclass(frozen=True)
class ShiftFields:
    """Fields of cosine heads on prototypes that are moved; goes with :class:`MethodConfig`.

    Attributes:
        cosine_scale: multiplies the cosines of the heads.
        margin: by how much the cosine of the right class has to lead in training.
        shift: whether rows of earlier tasks follow the features.
        sigma: how far an image of the task speaks for its surroundings in feature space.
        samples: features drawn of every row and epoch to align the heads.
        refit_epochs: epochs of the alignment.
        refit_learning_rate: learning rate of the alignment (SGD, momentum 0.9), cosine to zero.
    """

    positive: ClassVar[tuple[str, ...]] = ("cosine_scale", "sigma", "samples", "refit_learning_rate")

    cosine_scale: float = 20.0
    margin: float = 0.0
    shift: bool = True
    sigma: float = 4.0
    samples: int = 256
    refit_epochs: int = 5
    refit_learning_rate: float = 1e-2


def follow(rows: ClassStatistics, gaussians: Gaussians, before: Tensor, after: Tensor, sigma: float) -> None:
    """Moves the rows of earlier tasks by the semantic shift; covariances stay.

    Args:
        rows: class rows, whose features move as near their final ones as these do.
        gaussians: of the final feature.
        before: features of the task's images before training (n, row_dim).
        after: the same after it.
        sigma: of :func:`semantic_shift`.
    """
    dim, mean = gaussians.mean.shape[1], rows.moments.mean
    shift = semantic_shift(before, after, mean, dim, sigma)
    gaussians.mean = (gaussians.mean.double() + shift[:, :dim]).float()
    rows.move(torch.eye(len(shift[0]), dtype=torch.float64), mean + shift)


def align(
    heads: Heads,
    gaussians: Gaussians,
    row_task: Tensor,
    config: ShiftFields,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """Trains all heads on features drawn from the Gaussians, from where they are.

    The older their means are, the nearer to zero they are drawn.

    Args:
        heads: cosine heads, changed in place.
        gaussians: of all rows.
        row_task: their tasks (R,); the latest one is the current task.
        config: scale, samples, epochs and rate.
        weight_decay: of the heads.
        generator: draws the samples.
    """
    refit(
        heads,
        aged(gaussians.mean, row_task, int(row_task.max())),
        gaussians.factors(1e-3),
        F.cross_entropy,
        partial(torch.optim.SGD, lr=config.refit_learning_rate, momentum=0.9, weight_decay=weight_decay),
        config.samples,
        config.refit_epochs,
        config.samples,
        generator,
        logits=lambda x, weight, _: config.cosine_scale * cosines(x, weight),
    )


def settle(
    method: Method,
    config: ShiftFields,
    gaussians: Gaussians,
    task: TaskInfo,
    loader: Loader,
    before: Tensor | None,
) -> None:
    """After training: rows of earlier tasks are moved, the task's are added, then all heads are aligned.

    Args:
        method: has been trained.
        config: its fields.
        gaussians: of all its rows.
        task: the one being consolidated.
        loader: of its images; one pass.
        before: their features before training (n, row_dim); None where rows stay.
    """
    features, labels = method.observe(loader)
    if before is not None:
        follow(method.rows, gaussians, before, features, config.sigma)
    method.remember(task, features, labels)
    gaussians.add(method.final(features), labels, len(task.classes))
    if task.index > 0:
        generator = method.generator(task.index, "alignment")
        align(method.heads, gaussians, method.rows.task, config, method.config.weight_decay, generator)
