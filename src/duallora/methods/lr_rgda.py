"""LR-RGDA with HopDC: sequential LoRA under a Gaussian discriminant whose rows follow the features.

"LR-RGDA / HopDC" (arXiv 2602.00144): the classifier is analytic and low-rank, and what earlier tasks left of
their classes is moved by associating it with the images of the current task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians
from duallora.classifiers.low_rank_gaussian import Factors, LowRankGaussian
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.drift import associative_drift
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.methods.sldc import symmetric_losses

_OLD = 0.1  # share of a row that no compensation moves, as released


@dataclass(frozen=True)
class LRRGDAConfig(AdapterFields, MethodConfig):
    """Fields of LR-RGDA with HopDC.

    Attributes:
        rank: r, rank of the one adapter that all tasks train.
        class_rank: directions in which a class has a covariance of its own.
        own: weight of a class's own covariance.
        common: weight of the mean covariance.
        identity: weight of the identity.
        compensate: whether rows of earlier tasks follow the features.
        temperature: of the association, over cosines.
        nearest: images of the task that a point follows.
        samples: features drawn of every earlier row to measure where it has moved.
    """

    positive: ClassVar[tuple[str, ...]] = (
        "class_rank",
        "identity",
        "temperature",
        "nearest",
        "samples",
    )

    class_rank: int = 64
    own: float = 0.2
    common: float = 2.0
    identity: float = 0.5
    compensate: bool = True
    temperature: float = 0.05
    nearest: int = 400
    samples: int = 2000


class LRRGDA(Method):
    """``y = x W_0 + (x A) B`` trained in every task; the answer is a Gaussian discriminant.

    ``logit_c = log N(f; mu_c, own F_c F_c^T + common S + identity I)``. Heads only lead the training.
    """

    paper = "LR-RGDA, HopDC 2026 (2602.00144)"
    stores = "one A and B, a mean, covariance and factor per class"
    config: LRRGDAConfig

    def __init__(
        self, backbone: Backbone, config: LRRGDAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.attach_lora(config)
        self.gaussians = Gaussians(backbone.feature_dim, heads=False)
        self.keep_by_row("gaussians", self.gaussians)
        self.factors = Factors(backbone.feature_dim, config.class_rank)
        self.keep_by_row("factors", self.factors)
        self._discriminant: LowRankGaussian  # there once there are rows
        self._start: Tensor | None = None  # features of the task's images before it is trained

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Keeps what the model before the task makes of its images, until the task's end."""
        moves = task.index > 0 and len(task.classes) > 1  # a single class is not trained: nothing will drift
        if moves and self.config.compensate:
            self._start = self.observe(loader)[0]
        super().prepare(task, loader)

    def loss(self, batch: Batch) -> Tensor:
        """Symmetric cross-entropy on the current head."""
        logits = self.current_logits(batch.images)
        return self.class_loss.mean(symmetric_losses(logits, batch.labels), batch.labels)

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: rows of earlier tasks are moved, the task's are added, the discriminant is laid out."""
        self.merge()
        features, labels = self.observe(loader)
        if self._start is not None:
            self._follow(task, self._start, features)
        self._start = None
        self.remember(task, features, labels)
        self.gaussians.add(self.final(features), labels, len(task.classes))
        self.factors.replace(self.gaussians.covariance)
        self._lay_out()
        # Kept only as the shape of the task; what was trained here has no part in the answer.
        self.heads.tasks[task.index].requires_grad_(False)
        for parameter in self.heads.tasks[task.index].parameters():
            parameter.zero_()

    def _follow(self, task: TaskInfo, before: Tensor, after: Tensor) -> None:
        """Moves means and covariances to what samples of each row become; all rows share their noise."""
        config, gaussians, dim = self.config, self.gaussians, self.backbone.feature_dim

        def drift(points: Tensor) -> Tensor:
            return associative_drift(before, after, points, dim, config.temperature, config.nearest)

        shift = drift(gaussians.mean.to(before.device)).cpu().double()
        noise = torch.randn(config.samples, dim, generator=self.generator(task.index, "drift"))
        factors, means = gaussians.factors(1e-4), []
        for row, (mean, factor) in enumerate(zip(gaussians.mean, factors, strict=True)):
            drawn = (mean + noise @ factor.T).to(before.device)
            moved = (drawn + drift(drawn)[:, :dim]).cpu().double()
            centred = moved - moved.mean(0)
            spread = centred.T @ centred / max(len(moved) - 1, 1)
            gaussians.covariance[row] = (1 - _OLD) * spread.float() + _OLD * gaussians.covariance[row]
            means.append((1 - _OLD) * moved.mean(0) + _OLD * mean.double())
        shift[:, :dim] = torch.stack(means) - gaussians.mean.double()
        gaussians.mean = torch.stack(means).float()
        still = torch.eye(len(shift[0]), dtype=torch.float64)
        self.rows.move(still, self.rows.moments.mean + shift)

    def _lay_out(self) -> None:
        """The discriminant of the rows as they are now, if there are any."""
        config, covariance = self.config, self.gaussians.covariance
        if not len(covariance):
            return
        self._discriminant = LowRankGaussian(
            self.gaussians.mean,
            covariance.double().mean(0),
            self.factors.factor,
            (config.own, config.common, config.identity),
            self.device,
        )

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Log-density of all rows (n, R), up to a constant an image."""
        return self._discriminant.scores(self.final(encoding.features))

    def restored(self) -> None:
        """Merges the updates and lays the discriminant out."""
        super().restored()
        self._lay_out()

    def forget(self, task: int, kept: Tensor) -> None:
        """With the Gaussians of the rows; the discriminant is laid out anew."""
        super().forget(task, kept)
        self._lay_out()

    @torch.no_grad()
    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """With the discriminant of the simulated rows."""
        self._lay_out()
