"""Nearest class mean (SimpleCIL): prototypes of frozen features, a cosine classifier and no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.interface import Encoding, Loader, TaskInfo


@dataclass(frozen=True)
class NCMConfig(MethodConfig):
    """Fields of the nearest class mean; ``epochs``, ``batch_size`` and ``head_learning_rate`` have no effect.

    Attributes:
        scale: multiplies the cosines, which alone give all but uniform probabilities; it changes the answer
            only where a class has rows in several tasks, whose probabilities are added.
    """

    positive: ClassVar[tuple[str, ...]] = ("scale",)

    scale: float = 20.0


class NCM(Method):
    """``logit_c = scale cos(f, mean_c)`` with ``mean_c`` of the frozen features of class c."""

    paper = "SimpleCIL: Zhou et al. 2023 (2303.07338)"
    stores = "normalised class means, class rows"
    leaves = "its share of the pooled covariance"
    config: NCMConfig

    def extract(self, images: Tensor) -> Tensor:
        """Features of the bare backbone."""
        return self.frozen_features(images)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Nothing is trained."""
        return []

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: the task's prototypes become the weight of its head."""
        features, labels = self.observe(loader)
        self.remember(task, features, labels)
        means = self.final(self.rows.moments.mean[self.rows.task == task.index])  # (|Y_t|, d), fp64
        self.heads.tasks[task.index].weight.copy_(F.normalize(means))  # type: ignore[operator]

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Scaled cosines to all prototypes (n, R); the heads' biases are zero."""
        logits: Tensor = self.config.scale * self.heads(F.normalize(self.final(encoding.features)))
        return logits
