"""RanPAC: ridge regression on random features of a backbone that at most the first task adapts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.classifiers.random_features import RandomFeatureModel
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Encoding, Loader, TaskInfo


@dataclass(frozen=True)
class RanPACConfig(AdapterFields, MethodConfig):
    """Fields of RanPAC.

    Attributes:
        random_features: M, number of random features.
        ridge: l; null chooses it by generalised cross-validation after every task.
        first_session: train a LoRA in the first task and keep it; without, nothing is trained at all and the
            fields below, ``epochs``, ``batch_size`` and ``head_learning_rate`` have no effect.
        rank: rank of that LoRA.
        projections: which of q, k and v it adapts.
    """

    positive: ClassVar[tuple[str, ...]] = ("random_features", "ridge")

    random_features: int = 2000
    ridge: float | None = None
    first_session: bool = False


class RanPAC(Method):
    """``logits = log softmax(kappa relu(f P) (G + l I)^-1 Q)`` with G and Q added up over all tasks."""

    paper = "RanPAC: McDonnell et al. 2023 (2307.02251)"
    stores = "sums G and Q of random features, class rows"
    leaves = "its share of the pooled covariance, of G and of what a first session trained"
    config: RanPACConfig

    def __init__(
        self, backbone: Backbone, config: RanPACConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.ridge = RandomFeatureModel(
            backbone.feature_dim, config.random_features, config.ridge, seed, self.device
        )
        self.learned.add_module("ridge", self.ridge)
        if config.first_session:
            self.attach_lora(config)

    def grow(self, task: int) -> None:
        """The adapter is frozen from the second task on."""
        if task > 0:
            self.adapters.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter and head in a first session, else nothing."""
        first = self.config.first_session and len(self.heads.tasks) == 1
        return super().parameter_groups() if first else []

    def extract(self, images: Tensor) -> Tensor:
        """Features of the backbone as the first session left it; of the bare one without."""
        return super().extract(images) if self.beside else self.frozen_features(images)

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: G and Q grow, the ridge is chosen anew; the head of a first session is dropped."""
        super().consolidate(task, loader)
        # Kept only as the shape of the task; what was trained here has no part in the answer.
        self.heads.tasks[task.index].requires_grad_(False)
        for parameter in self.heads.tasks[task.index].parameters():
            parameter.zero_()

    def remember(self, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        """Rows of the calibration, then the ridge regression."""
        super().remember(task, features, labels)
        self.ridge.add(task.index, self.final(features), labels, len(task.classes))

    @torch.no_grad()
    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """With a random solution of the regression."""
        self.ridge.simulate([len(task.classes) for task in tasks], self.generator(0, "measurement"))

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Log-posterior over rows (n, R) of the ridge regression."""
        return self.ridge.log_q(self.final(encoding.features))

    def forget(self, task: int, kept: Tensor) -> None:
        """With the columns of Q and of the solution; G is a sum over all images and keeps their share."""
        stays = self.rows.staying(task, kept)
        images = int(self.rows.moments.count[~stays].sum())
        super().forget(task, kept)
        self.ridge.forget(task, stays, images, whole=not bool(kept.any()))
