"""SLCA: the whole backbone trained slowly, the heads aligned afterwards on Gaussians of all classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.adapters.trained_copy import TrainedCopy
from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians, aged, refit
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Loader, TaskInfo


@dataclass(frozen=True)
class SLCAConfig(MethodConfig):
    """Fields of SLCA.

    Attributes:
        backbone_rate: learning rate of the backbone over ``head_learning_rate``.
        logit_norm: logits are divided by their norm times this in the alignment.
        samples: features drawn of every row and epoch of the alignment.
        refit_epochs: epochs of the alignment.
        refit_learning_rate: learning rate of the alignment (SGD, momentum 0.9), cosine to zero.
    """

    positive: ClassVar[tuple[str, ...]] = ("samples", "refit_learning_rate")

    backbone_rate: float = 0.01
    logit_norm: float = 0.1
    samples: int = 256
    refit_epochs: int = 5
    refit_learning_rate: float = 1e-2


class SLCA(Method):
    """A trained copy of every parameter of the backbone, which itself stays as it is."""

    paper = "SLCA: Zhang et al. 2023 (2303.05118)"
    stores = "the whole backbone, heads, a mean and covariance per class"
    config: SLCAConfig

    def __init__(
        self, backbone: Backbone, config: SLCAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.copy = TrainedCopy(backbone)
        self.adapters["backbone"] = self.copy
        self.gaussians = Gaussians(backbone.feature_dim)
        self.keep_by_row("gaussians", self.gaussians)

    def extract(self, images: Tensor) -> Tensor:
        """Features of the backbone with the trained parameters in the place of its own."""
        return self.copy.features(self.backbone, images)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The current head, and the backbone at a fraction of its rate."""
        rate = self.config.head_learning_rate
        return [
            {"params": list(self.heads.tasks[-1].parameters()), "lr": rate},
            {"params": list(self.adapters.parameters()), "lr": rate * self.config.backbone_rate},
        ]

    def remember(self, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        """Rows of the calibration, then the Gaussians and the head as it was trained."""
        super().remember(task, features, labels)
        self.gaussians.keep(self.heads.tasks[task.index])
        self.gaussians.add(self.final(features), labels, len(task.classes))

    def restored(self) -> None:
        """Merges the updates; a model saved by an early version goes on from its aligned heads."""
        super().restored()
        self.gaussians.complete(self.heads)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass over the task's images; from the second task on all heads are aligned."""
        super().consolidate(task, loader)
        if task.index == 0:
            return
        task_of = self.rows.task.unique(return_inverse=True)[1]  # a forgotten task has no logits
        self.gaussians.restore(self.heads)
        refit(
            self.heads,
            aged(self.gaussians.mean, self.rows.task, task.index),
            self.gaussians.factors(1e-4),
            partial(
                normalised_cross_entropy,
                task=task_of.to(self.device),
                norm=self.config.logit_norm,
            ),
            partial(torch.optim.SGD, lr=self.config.refit_learning_rate, momentum=0.9, weight_decay=5e-4),
            self.config.samples,
            self.config.refit_epochs,
            self.config.samples,
            self.generator(task.index, "alignment"),
        )


def normalised_cross_entropy(logits: Tensor, rows: Tensor, task: Tensor, norm: float) -> Tensor:
    """Cross-entropy of ``logits / (norm * mean over tasks of |logits of the task|)``.

    Args:
        logits: (n, R).
        rows: the right ones (n,).
        task: of every row (R,).
        norm: ``logit_norm``.
    """
    squares = logits.new_zeros(len(logits), int(task.max()) + 1).index_add(1, task, logits.square())
    size = (squares + 1e-14).sqrt().mean(1, keepdim=True)  # a root of 0 has no gradient
    return F.cross_entropy(logits / size / norm, rows)
