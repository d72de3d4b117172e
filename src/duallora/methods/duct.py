"""DUCT: the tasks' changes of the backbone are merged, and old heads take over a share of the newest one.

"Dual Consolidation for Pre-Trained Model-Based Domain-Incremental Learning" (CVPR 2025, arXiv 2410.00911).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.adapters.trained_copy import TrainedCopy
from duallora.backbones.backbone import Backbone
from duallora.classifiers.cosine import cosines, current_cosines, head_cosines
from duallora.classifiers.prototypes import Prototypes
from duallora.classifiers.transport import transport_plan
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.runtime import parallel


@dataclass(frozen=True)
class DUCTConfig(MethodConfig):
    """Fields of DUCT.

    Attributes:
        backbone_rate: learning rate of the backbone over ``head_learning_rate``.
        cosine_scale: multiplies the cosines of the heads.
        merge: share of a task's change of the backbone that is merged, where the task is like what the
            backbone knows.
        head_merge: share of an old head that is replaced by what the newest one says of its classes.
        entropy: of the transport between classes, in units of distances of features.
        refit_epochs: epochs for which the newest head is trained again on the merged backbone.
        refit_learning_rate: learning rate of that (SGD, momentum 0.9).
    """

    positive: ClassVar[tuple[str, ...]] = ("cosine_scale", "entropy", "refit_learning_rate")

    backbone_rate: float = 0.01
    cosine_scale: float = 20.0
    merge: float = 0.25
    head_merge: float = 0.25
    entropy: float = 0.02
    refit_epochs: int = 5
    refit_learning_rate: float = 1e-3


class DUCT(Method):
    """``theta = theta_0 + merge sum_t s_t (theta_t - theta_0)``: every task starts from theta_0.

    ``s_t`` is the mean cosine between the task's class means under theta_t and under theta_0.
    """

    paper = "DUCT: Zhou et al. 2025 (2410.00911)"
    stores = "the merged backbone, heads, a mean per class"
    config: DUCTConfig

    def __init__(
        self, backbone: Backbone, config: DUCTConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.copy = TrainedCopy(backbone)
        self.adapters["backbone"] = self.copy
        self.prototypes = Prototypes(backbone.feature_dim)
        self.keep_by_row("prototypes", self.prototypes)
        self._merged: list[Tensor] = []  # parameters before the task, while it is learned
        self._known = torch.zeros(0)  # means of the task's classes on the bare backbone (k, d)

    def extract(self, images: Tensor) -> Tensor:
        """Features of the backbone with the copied parameters in the place of its own."""
        return self.copy.features(self.backbone, images)

    @torch.no_grad()
    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Measures the task's classes on the bare backbone, and puts the copy back to where that is."""
        bare = [(self.final(self.frozen_features(batch.images)), batch.labels) for batch in loader()]
        features, labels = (parallel.gather(torch.cat(parts)) for parts in zip(*bare, strict=True))
        self._known = class_means(features, labels, len(task.classes))
        self._merged = [p.detach().clone() for p in self.copy.values()]
        for copied, own in zip(self.copy.values(), self.copy.originals(self.backbone), strict=True):
            copied.copy_(own)
        super().prepare(task, loader)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight of the current head, which has no bias, and the backbone at a fraction of its rate."""
        rate = self.config.head_learning_rate
        return [
            {"params": [self.heads.tasks[-1].get_parameter("weight")], "lr": rate},
            {"params": list(self.copy.values()), "lr": rate * self.config.backbone_rate},
        ]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of scaled cosines over the classes of the current task."""
        logits = self.config.cosine_scale * self.current_logits(batch.images)
        return self.class_loss.cross_entropy(logits, batch.labels)

    def current_logits(self, images: Tensor) -> Tensor:
        """Cosines (n, |Y_t|) with the weights of the current head."""
        return current_cosines(self.heads, self.features(images))

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Scaled cosines to all rows (n, R)."""
        return self.config.cosine_scale * head_cosines(self.heads, encoding.features)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Two passes: one to weigh the task's change by, one on the merged backbone for heads and rows."""
        self._merge(task, loader)
        features, labels = self.observe(loader)
        if len(task.classes) > 1:  # else nothing was trained, and the head says nothing of others
            self._refit(task, self.final(features), labels)
            self._transport(task)
        self.prototypes.add(self._known)
        self._known = torch.zeros(0)
        self.remember(task, features, labels)

    @torch.no_grad()
    def _merge(self, task: TaskInfo, loader: Loader) -> None:
        """Adds a share of the task's change to what was merged before."""
        share = 0.0
        if len(task.classes) > 1:
            features, labels = self.observe(loader)
            trained = class_means(self.final(features), labels, len(task.classes))
            share = self.config.merge * float(F.cosine_similarity(trained, self._known).mean())
        own = self.copy.originals(self.backbone)
        for copied, merged, start in zip(self.copy.values(), self._merged, own, strict=True):
            copied.copy_(merged + share * (copied - start))
        self._merged = []

    @torch.enable_grad()
    def _refit(self, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        """Trains the newest head again, on features (n, d) of the merged backbone."""
        config, weight = self.config, self.heads.tasks[-1].get_parameter("weight")
        trained, generator = weight.detach().clone().requires_grad_(), self.generator(task.index, "refit")
        sgd = torch.optim.SGD(
            [trained], lr=config.refit_learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
        for _ in range(config.refit_epochs):
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for some in order.split(config.step_images):
                sgd.zero_grad()
                cosine = cosines(features[some], trained)
                F.cross_entropy(config.cosine_scale * cosine, labels[some]).backward()
                sgd.step()
        with torch.no_grad():
            weight.copy_(trained)

    @torch.no_grad()
    def _transport(self, task: TaskInfo) -> None:
        """Old heads take over a share of the newest one, class by class as their prototypes are alike."""
        newest = F.normalize(self.heads.tasks[-1].get_parameter("weight"))
        for index in range(task.index):
            of_old = self.rows.task == index
            if not bool(of_old.any()):
                continue  # forgotten
            cost = torch.cdist(self.prototypes.mean[of_old].double(), self._known.cpu().double())
            plan = transport_plan(cost, self.config.entropy).float().to(self.device)
            weight = self.heads.tasks[index].get_parameter("weight")
            share = self.config.head_merge
            weight.copy_((1 - share) * F.normalize(weight) + share * plan @ newest)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Means (k, d) of features (n, d) by their labels (n,)."""
    return torch.stack([features[labels == c].mean(0) for c in range(classes)])
