"""CL-LoRA: shared pairs held by an early exit below, a weighted pair for each task above.

"CL-LoRA: Continual Low-Rank Adaptation for Rehearsal-Free Class-Incremental Learning" (CVPR 2025, arXiv
2505.24816).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.per_pass import PerPass
from duallora.adapters.shared_pairs import SharedPairs, TaskPairs
from duallora.adapters.wrapped_qkv import adapted_layers
from duallora.backbones.backbone import Backbone
from duallora.classifiers.cosine import cosines, current_cosines
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.methods.task_adapters import (
    known_tasks,
    own_features,
    picked,
    prototypes,
    training_features,
    under,
)


@dataclass(frozen=True)
class CLLoRAConfig(AdapterFields, MethodConfig):
    """Fields of CL-LoRA.

    Attributes:
        rank: r, of the shared pairs and of each task's.
        shared_layers: adapted layers, from the lowest, whose pair all tasks share; null is half of them.
        distillation: weight of the early exit's distance to the model before the task.
        temperature: of both distributions there.
        orthogonality: weight of the mean absolute cosine between the block weights of different tasks.
        sigma: what the cosines of the head in training are multiplied by at first; it is learned.
        scale: multiplies the cosines to the prototypes, which alone give all but uniform probabilities.
    """

    positive: ClassVar[tuple[str, ...]] = ("temperature", "sigma", "scale")

    shared_layers: int | None = None
    distillation: float = 5.0
    temperature: float = 2.0
    orthogonality: float = 1e-4
    sigma: float = 1.0
    scale: float = 20.0
    projections: Literal["qv", "kv", "qkv"] = "qv"


class CLLoRA(Method):
    """Shared pairs below, a pair for each task above; prototypes of each task under its own pair.

    ``y = x (W_0 + A B)`` with A as drawn in the lower adapted layers, ``y = x (W_0 + w_t A_t B_t)`` above.
    """

    paper = "CL-LoRA: He et al. 2025 (2505.24816)"
    stores = "shared A and B, a pair and weights a task, prototypes, class rows"
    leaves = "its share of the pooled covariance and what it trained of the shared pairs"
    more_passes = "tasks"
    config: CLLoRAConfig

    def __init__(
        self, backbone: Backbone, config: CLLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self._acting: PerPass[int | Tensor] = PerPass()
        self._reweighting: PerPass[bool] = PerPass()
        layers = adapted_layers(backbone, config.first_adapted_layer)
        half = len(layers) // 2 if config.shared_layers is None else config.shared_layers
        self._shared_layers = layers[:half]
        generator, places = self.generator(0, "shared adapter"), len(config.projections)

        def make(dim: int, out: int) -> nn.Module:
            if next(below):
                return SharedPairs(dim, out, places, config.rank, generator, self._reweighting)
            return TaskPairs(dim, out, places, self._acting)

        below = iter([layer in self._shared_layers for layer in layers])
        self.attach(config.first_adapted_layer, config.projections, make)
        updates = list(self.adapters.values())
        self.shared = [update for update in updates if isinstance(update, SharedPairs)]
        self.own = [update for update in updates if isinstance(update, TaskPairs)]
        self._teacher: list[Tensor | None] = []  # merged shared weights before the task, while it is learned
        self._sigma: nn.Parameter | None = None  # of the head in training

    @property
    def passes(self) -> int:
        """One a task."""
        return max(len(known_tasks(self.heads)), 1)

    def grow(self, task: int) -> None:
        """A pair and its weights in every layer above the shared ones."""
        generator = self.generator(task, "adapter")
        for pairs in self.own:
            pairs.open(self.config.rank, generator, self.device)

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Keeps the shared weights, if a task has trained them, and weighs the columns of B by their norm."""
        if len(task.classes) > 1 and any(bool(pairs.b.any()) for pairs in self.shared):
            self._teacher = [self.beside[layer].effective for layer in self._shared_layers]
            for pairs in self.shared:
                pairs.weigh()
        super().prepare(task, loader)
        self._sigma = nn.Parameter(torch.tensor(self.config.sigma, device=self.device))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight and factor of the head, the shared B, and the task's pairs with their weights."""
        groups = super().parameter_groups()
        groups[0]["params"] = [self.heads.tasks[-1].weight, self._sigma]
        return groups

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of cosines, what keeps the early exit, and what keeps block weights apart."""
        loss = self.class_loss.cross_entropy(self.current_logits(batch.images), batch.labels)
        if self._teacher:
            loss = loss + self.config.distillation * self._early_exit_loss(batch.images)
        return loss + self.config.orthogonality * self._weights_cosine()

    def current_logits(self, images: Tensor) -> Tensor:
        """Cosines (n, |Y_t|) times sigma, with the task's own pairs for every image."""
        return self._cosines(training_features(self, self._acting, images))

    def _cosines(self, features: Tensor) -> Tensor:
        """``sigma cos(f, w_c)`` of the current head (n, |Y_t|)."""
        found = current_cosines(self.heads, features)
        return found if self._sigma is None else self._sigma * found

    def _early_exit_loss(self, images: Tensor) -> Tensor:
        """Cross-entropy between the head's answers to the exits of the old and the new shared pairs.

        The gradient of each column of B is multiplied by the share that the column had of the norm before the
        task.
        """
        exit_after, t = self._shared_layers[-1], self.config.temperature
        with self.context.autocast():
            with self._reweighting.holding(True):
                new = self.backbone.early_exit(images, exit_after)
            wrappers = [self.beside[layer] for layer in self._shared_layers]
            for wrapper, weight in zip(wrappers, self._teacher, strict=True):
                wrapper.effective = weight
            try:
                with torch.no_grad():
                    old = self.backbone.early_exit(images, exit_after)
            finally:
                for wrapper in wrappers:
                    wrapper.separate()
        soft = (self._cosines(old.float()) / t).softmax(1)
        return -(soft * (self._cosines(new.float()) / t).log_softmax(1)).sum(1).mean()

    def _weights_cosine(self) -> Tensor:
        """Mean over earlier tasks of ``|cos|`` between their block weights and those in training."""
        if not self.own:
            return torch.zeros((), device=self.device)
        weights = [torch.cat([pairs.weights[task] for pairs in self.own]) for task in known_tasks(self.heads)]
        if len(weights) < 2:
            return torch.zeros((), device=self.device)
        return F.cosine_similarity(torch.stack(weights[:-1]), weights[-1][None]).abs().mean()

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass under the task's pairs for its prototypes, then the rows, each image as at inference."""
        self._teacher, self._sigma = [], None
        for pairs in self.shared:
            pairs.weights = None
        self.merge()
        features, labels = own_features(self, self._acting, task.index, loader())
        head = self.heads.tasks[task.index]
        head.get_parameter("weight").copy_(prototypes(features, labels, len(task.classes)))
        head.get_parameter("bias").zero_()
        super().consolidate(task, loader)

    def encode(self, images: Tensor) -> Encoding:
        """A pass for every task; the features are those of the task whose prototype is nearest."""
        known = known_tasks(self.heads)
        if not known:
            return Encoding(self.backbone(images).float())
        every = torch.stack([under(self, self._acting, images, task) for task in known])
        with torch.autocast(images.device.type, enabled=False):
            weights = [self.heads.tasks[task].get_parameter("weight") for task in known]
            logits = [
                self.config.scale * cosines(self.final(features), weight)
                for weight, features in zip(weights, every, strict=True)
            ]
        best = torch.stack([of_task.amax(1) for of_task in logits]).argmax(0)
        chosen = torch.tensor(known, device=images.device)[best]
        return Encoding(picked(every, best), chosen=chosen, logits=torch.cat(logits, 1))

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, row_dim), each image under the pairs of its nearest task."""
        return self.encode(images).features

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task also its pairs, which make no pass from then on."""
        super().forget(task, kept)
        if not bool(kept.any()):
            for pairs in self.own:
                pairs.clear(task)
