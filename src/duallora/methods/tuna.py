"""TUNA: an adapter a task, of which the surest answers, beside one merged of all of them.

"Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based Class-Incremental Learning"
(ICCV 2025, arXiv 2508.08165).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.bottleneck import TaskBottlenecks
from duallora.adapters.per_pass import PerPass
from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians, aged
from duallora.classifiers.cosine import cosface_logits, cosines, current_cosines, head_cosines
from duallora.methods.base import Method
from duallora.methods.config import BottleneckFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.methods.task_adapters import (
    AlignmentFields,
    align,
    clear,
    known_tasks,
    open_from_last,
    own_features,
    picked,
    row_tasks,
    training_features,
    under,
)


@dataclass(frozen=True)
class TUNAConfig(AlignmentFields, BottleneckFields, MethodConfig):
    """Fields of TUNA.

    Attributes:
        rank: r, width of each bottleneck; 30 has as many parameters as LoRA of rank 20.
        cosine_scale: multiplies the cosines of the heads.
        margin: by how much the cosine of the right class has to lead in training.
        orthogonality: weight of the loss that keeps up-projections of different tasks apart.
        decay: whether means are drawn nearer to zero the older they are, by up to a tenth, in the alignment.
    """

    positive: ClassVar[tuple[str, ...]] = ("cosine_scale",)

    cosine_scale: float = 20.0
    margin: float = 0.0
    orthogonality: float = 1e-3
    decay: bool = True


class WithUniversal(nn.Module):
    """Bottlenecks of one layer, one a task, and one merged of them, which is not saved.

    Args:
        own: of the tasks.
        universal: whether the merged one acts in a pass, in the place of a task's.
    """

    def __init__(self, own: TaskBottlenecks, universal: PerPass[bool]) -> None:
        super().__init__()
        self.own, self.universal = own, universal
        self.merged: list[Tensor] = []  # in the order of a bottleneck's parameters

    @torch.no_grad()
    def merge(self, tasks: Sequence[int]) -> None:
        """Merges the bottlenecks of some tasks."""
        each = zip(*(self.own.tasks[task].parameters() for task in tasks), strict=True)
        self.merged = [elected(torch.stack(parameters)) for parameters in each]

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, N, d) -> (B, N, d); None where no bottleneck is chosen."""
        if not self.universal.get():
            update: Tensor | None = self.own(x)
            return update
        down, down_bias, up, up_bias = self.merged
        y: Tensor = self.own.scale * ((x @ down + down_bias).relu() @ up + up_bias)
        return y


def elected(parameters: Tensor) -> Tensor:
    """Of T tensors (T, ...), by entry: the sign of their sum, with the largest size of those that have it."""
    positive = parameters.sum(0) > 0
    largest = torch.where(positive, parameters, -parameters).amax(0).clamp(min=0)
    return torch.where(positive, largest, -largest)


class TUNA(Method):
    """A bottleneck a task and a universal one beside every mlp; the surest task's and the universal answer.

    ``p = (softmax(z_s) + softmax(z_u)) / 2``, ``z = scale cos(f, w)`` over all classes; s is the task under
    whose bottleneck the answer has the least entropy, u the bottleneck merged of all.
    """

    paper = "TUNA: Wang et al. 2025 (2508.08165)"
    stores = "a bottleneck a task, heads, a mean and covariance per class"
    leaves = "its share of the pooled covariance and of the adapters of later tasks"
    more_passes = "tasks + 1"
    config: TUNAConfig

    def __init__(
        self, backbone: Backbone, config: TUNAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self._acting: PerPass[int | Tensor] = PerPass()
        self._universal: PerPass[bool] = PerPass()
        self.layers: list[WithUniversal] = []
        self.attach_mlp(config.first_adapted_layer, self._make)
        self.gaussians = Gaussians(backbone.feature_dim, heads=False)
        self.keep_by_row("gaussians", self.gaussians)

    def _make(self, dim: int) -> WithUniversal:
        own = TaskBottlenecks(dim, self.config.rank, self.config.scale, self._acting)
        self.layers.append(WithUniversal(own, self._universal))
        return self.layers[-1]

    @property
    def passes(self) -> int:
        """One a task, and from the second task on one under the universal adapter."""
        known = len(known_tasks(self.heads))
        return known + 1 if known > 1 else 1

    def grow(self, task: int) -> None:
        """A bottleneck in every adapted layer, which starts as the last one is."""
        open_from_last((b.own for b in self.layers), self.generator(task, "adapter"), self.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight of the head, which has no bias, and the task's adapter."""
        head, *rest = super().parameter_groups()
        return [{**head, "params": [self.heads.tasks[-1].get_parameter("weight")]}, *rest]

    def loss(self, batch: Batch) -> Tensor:
        """CosFace over the current classes, and what keeps the up-projection apart from earlier ones."""
        task, config = len(self.heads.tasks) - 1, self.config
        cosine = self.current_logits(batch.images)
        logits = cosface_logits(cosine, batch.labels, config.cosine_scale, config.margin)
        loss = self.class_loss.cross_entropy(logits, batch.labels)
        return loss + config.orthogonality * math.exp(-task - 1) * self._overlap(task)

    def current_logits(self, images: Tensor) -> Tensor:
        """Cosines (n, |Y_t|) with the weights of the current head, through the task's own adapter."""
        return current_cosines(self.heads, training_features(self, self._acting, images))

    def _overlap(self, task: int) -> Tensor:
        """Sum over earlier tasks of the mean over layers of ``|u_i . u_t|``, u the mean unit column of U."""
        found = torch.zeros((), device=self.device)
        for layer in self.layers:
            means = torch.stack([F.normalize(b.get_parameter("up"), dim=0).mean(1) for b in layer.own.tasks])
            found = found + (means[:task].detach() @ means[task]).abs().sum() / len(self.layers)
        return found

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Merges adapters; a pass under the task's own for its Gaussians, aligned heads, then the rows."""
        self._merge()
        features, labels = own_features(self, self._acting, task.index, loader())
        self.gaussians.add(features, labels, len(task.classes))
        if task.index > 0:
            self._align(task.index)
        super().consolidate(task, loader)

    def _align(self, task: int) -> None:
        """Trains all heads on features drawn from the Gaussians, from where they are."""
        config, mean = self.config, self.gaussians.mean
        if config.decay:
            mean = aged(mean, row_tasks(self.heads).cpu(), task)
        align(
            self.heads,
            self.gaussians,
            mean,
            config,
            config.weight_decay,
            self.generator(task, "refit"),
            lambda x, weight, _: config.cosine_scale * cosines(x, weight),
        )

    def _merge(self) -> None:
        """Makes the universal adapter of those of all tasks."""
        tasks = known_tasks(self.heads)
        if tasks:
            for layer in self.layers:
                layer.merge(tasks)

    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """Merges what stands for the adapters."""
        self._merge()

    def restored(self) -> None:
        """After a load: the universal adapter is not saved."""
        super().restored()
        self._merge()

    def encode(self, images: Tensor) -> Encoding:
        """A pass for every task and one under the universal adapter; the features are the surest task's."""
        known = known_tasks(self.heads)
        if not known:
            return Encoding(self.backbone(images).float())
        every = torch.stack([under(self, self._acting, images, task) for task in known])
        answers = torch.stack([self._answer(features) for features in every])  # (K, n, R)
        entropy = -(answers * answers.clamp(min=1e-10).log()).sum(2)
        best = entropy.argmin(0)
        answer = picked(answers, best)
        if len(known) > 1:
            with self._universal.holding(True):
                universal = self._answer(self.backbone(images).float())
            answer = (answer + universal) / 2
        chosen = torch.tensor(known, device=images.device)[best]
        return Encoding(picked(every, best), chosen=chosen, logits=answer.clamp(min=1e-30).log())

    def _answer(self, features: Tensor) -> Tensor:
        """Probabilities of all rows (n, R), fp32, also inside a pass under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            scores = self.config.cosine_scale * head_cosines(self.heads, features)
        return scores.softmax(1)

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, row_dim), each image under the adapter of its surest task."""
        return self.encode(images).features

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task also its adapter, and its part in the universal one."""
        super().forget(task, kept)
        if not bool(kept.any()):
            clear((b.own for b in self.layers), task)
            self._merge()
