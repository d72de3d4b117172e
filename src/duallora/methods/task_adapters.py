"""What methods with an adapter a task share: passes under one of them, choices, and heads aligned after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.adapters.bottleneck import TaskBottlenecks
from duallora.adapters.per_pass import PerPass
from duallora.classifiers.alignment import Gaussians, affine, refit
from duallora.classifiers.heads import Heads
from duallora.methods.base import Method
from duallora.methods.interface import Batch
from duallora.runtime import parallel


@dataclass(frozen=True)
class AlignmentFields:
    """Fields of heads that are aligned after a task; goes with :class:`MethodConfig`.

    Attributes:
        samples: features drawn of every row and epoch to align the heads.
        refit_epochs: epochs of the alignment.
        refit_learning_rate: learning rate of the alignment (SGD, momentum 0.9), cosine to zero.
    """

    positive: ClassVar[tuple[str, ...]] = ("samples", "refit_learning_rate")

    samples: int = 160
    refit_epochs: int = 30
    refit_learning_rate: float = 5e-3


def align(
    heads: Heads,
    gaussians: Gaussians,
    mean: Tensor,
    config: AlignmentFields,
    weight_decay: float,
    generator: torch.Generator,
    logits: Callable[[Tensor, Tensor, Tensor], Tensor] = affine,
) -> None:
    """Trains all heads by cross-entropy on features drawn from Gaussians, from where they are.

    Args:
        heads: changed in place.
        gaussians: of all rows, each under the adapter of its own task.
        mean: theirs, or what takes its place (R, d).
        config: samples, epochs and rate.
        weight_decay: of the heads.
        generator: draws the samples.
        logits: of features (n, d), weight (R, d) and bias (R,).
    """
    refit(
        heads,
        mean,
        gaussians.factors(1e-4),
        F.cross_entropy,
        partial(torch.optim.SGD, lr=config.refit_learning_rate, momentum=0.9, weight_decay=weight_decay),
        config.samples,
        config.refit_epochs,
        config.samples,
        generator,
        logits=logits,
    )


def known_tasks(heads: Heads) -> list[int]:
    """Tasks of which a class is left, the one that is being learned included."""
    return [task for task, head in enumerate(heads.tasks) if head.out_features]


def row_tasks(heads: Heads) -> Tensor:
    """The task of every output of the heads side by side (R,)."""
    counts = torch.tensor([len(head.get_parameter("bias")) for head in heads.tasks])
    return torch.arange(len(counts)).repeat_interleave(counts).to(heads.device)


def under(method: Method, acting: PerPass[int | Tensor], images: Tensor, tasks: int | Tensor) -> Tensor:
    """Features (n, row_dim), fp32, with the adapter of a task, or of one for each image.

    Args:
        method: whose adapters read ``acting``.
        acting: the task whose adapter acts in a pass.
        images: (n, 3, H, W).
        tasks: the task; (n,) one for each image.
    """
    if isinstance(tasks, int):  # as a tensor: a compiled pass is the same for all tasks
        tasks = torch.full((images.shape[0],), tasks, device=images.device)
    with acting.holding(tasks):
        features: Tensor = method.backbone(images).float()
    return features


def training_features(method: Method, acting: PerPass[int | Tensor], images: Tensor) -> Tensor:
    """Final features (n, feature_dim), fp32, with the adapter of the task in training for every image."""
    with method.context.autocast(), acting.holding(len(method.heads.tasks) - 1):
        return method.final(method.backbone(images).float())


@torch.no_grad()
def own_features(
    method: Method, acting: PerPass[int | Tensor], task: int, batches: Iterable[Batch]
) -> tuple[Tensor, Tensor]:
    """A pass over a task's images under its own adapter: final features (n, feature_dim), labels (n,)."""
    features, labels = [], []
    for batch in batches:
        with method.context.autocast():
            features.append(method.final(under(method, acting, batch.images, task)))
        labels.append(batch.labels)
    return parallel.gather(torch.cat(features)), parallel.gather(torch.cat(labels))


def picked(every: Tensor, best: Tensor) -> Tensor:
    """Of K results for each of n images (K, n, ...) the one at its place ``best`` (n,): (n, ...)."""
    return every[best, torch.arange(best.shape[0], device=best.device)]


def prototypes(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class means of features (n, d), at unit length (classes, d)."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels.cpu(), features.cpu().double())
    return F.normalize(sums).float()


def open_from_last(
    layers: Iterable[TaskBottlenecks], generator: torch.Generator, device: torch.device
) -> None:
    """Opens a bottleneck in every layer; it starts as the last that is not cleared, the first as drawn."""
    for layer in layers:
        opened = layer.open(generator, device)
        for earlier in reversed(list(layer.tasks)[:-1]):
            if bool(earlier.get_parameter("down").any()):
                opened.load_state_dict(earlier.state_dict())
                break


@torch.no_grad()
def clear(layers: Iterable[TaskBottlenecks], task: int) -> None:
    """Sets the bottlenecks of a task to zero."""
    for layer in layers:
        for parameter in layer.tasks[task].parameters():
            parameter.zero_()
