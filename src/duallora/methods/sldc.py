"""SLDC: sequential LoRA with distillation; rows follow the drift of the features, heads are refitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians, refit
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.drift import linear_map, ridge_map, weakly_nonlinear_map
from duallora.methods.interface import Batch, Loader, TaskInfo


@dataclass(frozen=True)
class SLDCConfig(AdapterFields, MethodConfig):
    """Fields of SLDC.

    Attributes:
        rank: r, rank of the one adapter that all tasks train.
        gamma_kd: weight of the distance to the features of the model before the task.
        gamma_norm: weight of the distance to their norms.
        drift: how rows of earlier tasks follow the features: by a nonlinear map, by one whose nonlinear share
            is penalised, by a linear one, or not.
        alpha: ``linear`` is blended with the identity by ``exp(-n / (alpha d))``, n images.
        drift_steps: Adam steps of the ``nonlinear`` and ``penalised`` maps.
        samples: features drawn of every row and epoch to refit the heads.
        refit_epochs: epochs of the refit.
        refit_learning_rate: Adam's learning rate of the refit, cosine to a tenth.
    """

    positive: ClassVar[tuple[str, ...]] = ("drift_steps", "samples", "refit_learning_rate")

    gamma_kd: float = 1.0
    gamma_norm: float = 0.1
    drift: Literal["nonlinear", "penalised", "linear", "none"] = "nonlinear"
    alpha: float = 1.0
    drift_steps: int = 2000
    samples: int = 1024
    refit_epochs: int = 6
    refit_learning_rate: float = 5e-4


class SLDC(Method):
    """``y = x W_0 + (x A) B`` trained in every task; Gaussians of old classes are moved, not protected."""

    paper = "SLDC: Rao et al. 2025 (2511.09926)"
    stores = "one A and B, heads, a mean and covariance per class"
    config: SLDCConfig

    def __init__(
        self, backbone: Backbone, config: SLDCConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.attach_lora(config)
        self.gaussians = Gaussians(backbone.feature_dim)
        self.keep_by_row("gaussians", self.gaussians)
        self._teacher: list[Tensor | None] = []  # merged weights before the task, while it is learned
        self._start: Tensor | None = None  # features of the task's images with them

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Keeps the model before the task, and what it makes of the task's images, until the task's end."""
        if task.index > 0 and len(task.classes) > 1:  # a single class is not trained: nothing will drift
            self._teacher = [wrapper.effective for wrapper in self.beside.values()]
            if self.config.drift != "none":
                self._start = self.observe(loader)[0]
        super().prepare(task, loader)

    def loss(self, batch: Batch) -> Tensor:
        """Symmetric cross-entropy on the current head; from the second task on with distillation."""
        f = self.final(self.features(batch.images))
        logits = self.heads.current(f)
        loss = self.class_loss.mean(symmetric_losses(logits, batch.labels), batch.labels)
        if not self._teacher:
            return loss
        before = self._before_features(batch.images)
        norms = F.mse_loss(f.norm(dim=1), before.norm(dim=1))
        return loss + self.config.gamma_kd * F.mse_loss(f, before) + self.config.gamma_norm * norms

    @torch.no_grad()
    def _before_features(self, images: Tensor) -> Tensor:
        """Features of the model before the task (n, d)."""
        for wrapper, weight in zip(self.beside.values(), self._teacher, strict=True):
            wrapper.effective = weight
        try:
            return self.final(self.features(images))
        finally:
            for wrapper in self.beside.values():
                wrapper.separate()

    def restored(self) -> None:
        """Merges the updates; a model saved by an early version goes on from its aligned heads."""
        super().restored()
        self.gaussians.complete(self.heads)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: rows of earlier tasks are moved, the task's are added, all heads are refitted."""
        self.merge()
        features, labels = self.observe(loader)
        if self._start is not None:
            self._follow(task, self._start, features)
        self._teacher, self._start = [], None
        self.remember(task, features, labels)
        self.gaussians.add(self.final(features), labels, len(task.classes))
        self.gaussians.keep(self.heads.tasks[task.index])
        self.gaussians.restore(self.heads)
        refit(
            self.heads,
            self.gaussians.mean,
            self.gaussians.factors(1e-3),
            symmetric_cross_entropy,
            partial(torch.optim.Adam, lr=self.config.refit_learning_rate, weight_decay=1e-4),
            self.config.samples,
            self.config.refit_epochs,
            3 * len(self.gaussians.mean),  # 3.2 a row there, and here as many of every row
            self.generator(task.index, "refit"),
            end=0.1,
        )

    def _drift(self, task: TaskInfo, before: Tensor, after: Tensor) -> nn.Module:
        """The map of ``drift`` from the task's features (n, d) before training to those after it."""
        if self.config.drift == "linear":
            return linear_map(before, after, self.config.alpha)
        penalty = 0.5 if self.config.drift == "penalised" else 0.0
        generator = self.generator(task.index, "drift")
        return weakly_nonlinear_map(before, after, self.config.drift_steps, generator, penalty)

    def _follow(self, task: TaskInfo, before: Tensor, after: Tensor) -> None:
        """Moves means by the map, covariances by its Jacobians there, the pooled one by their mean.

        The map is that of the final feature, SLDC's only one; what else the rows read follows a linear map
        of its own.
        """
        drift = self._drift(task, self.final(before), self.final(after))
        mean, count = self.rows.moments.mean, self.rows.moments.count
        point = self.final(mean).float().to(self.device)
        jacobian = torch.func.vmap(torch.func.jacrev(drift), chunk_size=16)(point).cpu().double()
        with torch.no_grad():
            moved = drift(point).cpu()
        self.gaussians.move(moved, jacobian)
        pooled = (jacobian * (count / count.sum())[:, None, None]).sum(0)
        dim = point.shape[1]
        beside = ridge_map(before[:, dim:], after[:, dim:])
        means = torch.cat([moved.double(), mean[:, dim:] @ beside], 1)
        self.rows.move(torch.block_diag(pooled.T, beside), means)


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean () of ``symmetric_losses``."""
    return symmetric_losses(logits, labels).mean()


def symmetric_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image (n,), half ``-log p(c)`` and half ``-log(1e-4) (1 - p(c))``, with the roles exchanged."""
    own = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return (-own - math.log(1e-4) * (1 - own.exp())) / 2
