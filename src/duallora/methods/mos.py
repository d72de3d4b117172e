"""MOS: an adapter a task, drawn to the mean of the earlier ones; an image finds its adapter in rounds.

"MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning" (AAAI 2025, arXiv 2412.09441).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.bottleneck import Bottleneck, TaskBottlenecks
from duallora.adapters.per_pass import PerPass
from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians
from duallora.classifiers.cosine import cosines
from duallora.classifiers.prototypes import Prototypes
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
    prototypes,
    row_tasks,
    training_features,
    under,
)


@dataclass(frozen=True)
class MOSConfig(AlignmentFields, BottleneckFields, MethodConfig):
    """Fields of MOS.

    Attributes:
        rank: r, width of each task's bottleneck; 30 has as many parameters as LoRA of rank 20.
        merge: share of the mean of the earlier adapters that is mixed into the one in training, each step.
        repeated_merge: the released behaviour: every layer of every pass merges again, so that a step merges
            once more than there are layers, and at inference only the mean of the earlier ones is left.
        contrast: weight of the loss that keeps features apart from class means and from one another.
        contrast_temperature: of the products there.
        rounds: how often an image may change its adapter.
        ensemble: whether the answer under the first adapter has a share in the last one.
    """

    positive: ClassVar[tuple[str, ...]] = ("contrast_temperature", "rounds")

    merge: float = 0.1
    repeated_merge: bool = False
    contrast: float = 0.1
    contrast_temperature: float = 0.8
    rounds: int = 4
    ensemble: bool = True


class MOS(Method):
    """A bottleneck a task beside every mlp; an image goes on with the task of its last answer.

    ``task_0`` is that of the nearest prototype under the first adapter, ``task_i`` that of the heads' answer
    under the adapter of ``task_{i-1}``.
    """

    paper = "MOS: Sun et al. 2025 (2412.09441)"
    stores = "a bottleneck a task and their mean, heads, prototypes, a mean and covariance per class"
    leaves = "its share of the pooled covariance and of the adapters of later tasks"
    more_passes = "tasks, at most 5"
    config: MOSConfig

    def __init__(
        self, backbone: Backbone, config: MOSConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self._acting: PerPass[int | Tensor] = PerPass()
        self.layers: list[TaskBottlenecks] = []
        self.attach_mlp(config.first_adapted_layer, self._make)
        blank = torch.Generator()
        # Means of all adapters as they were trained, one a layer: what the next one is drawn to.
        self.means = [Bottleneck(b.dim, b.rank, b.scale, blank).to(self.device) for b in self.layers]
        self.adapters["means"] = nn.ModuleList(self.means).requires_grad_(False)
        self.gaussians = Gaussians(backbone.feature_dim, heads=False)
        self.keep_by_row("gaussians", self.gaussians)
        self.prototypes = Prototypes(backbone.feature_dim)
        self.keep_by_row("prototypes", self.prototypes)

    def _make(self, dim: int) -> TaskBottlenecks:
        self.layers.append(TaskBottlenecks(dim, self.config.rank, self.config.scale, self._acting))
        return self.layers[-1]

    @property
    def _adapters_used(self) -> list[int]:
        """Tasks whose adapters an image may meet; prototypes lie under the first, even a forgotten one."""
        return sorted({0, *known_tasks(self.heads)})

    @property
    def passes(self) -> int:
        """One a task, but never more than the first look and the rounds."""
        return min(len(self._adapters_used), 1 + self.config.rounds)

    def grow(self, task: int) -> None:
        """A bottleneck in every adapted layer, which starts as the last one is."""
        open_from_last(self.layers, self.generator(task, "adapter"), self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the current classes, and the contrast to class means and in the batch."""
        f = training_features(self, self._acting, batch.images)
        points = torch.cat([self.gaussians.mean.to(f.device), f])
        products = points @ points.T / self.config.contrast_temperature
        contrast = F.cross_entropy(products, torch.arange(len(points), device=f.device))
        loss = self.class_loss.cross_entropy(self.heads.current(f), batch.labels)
        return loss + self.config.contrast * contrast

    def current_logits(self, images: Tensor) -> Tensor:
        """Logits (n, |Y_t|) of the current head, through the task's own adapter."""
        return self.heads.current(training_features(self, self._acting, images))

    @torch.no_grad()
    def after_step(self) -> None:
        """Draws the adapter in training to the mean of the earlier ones."""
        if len(self.heads.tasks) == 1:
            return
        times = 1 + self.backbone.depth if self.config.repeated_merge else 1
        share = 1 - (1 - self.config.merge) ** times
        for layer, mean in zip(self.layers, self.means, strict=True):
            for own, earlier in zip(layer.tasks[-1].parameters(), mean.parameters(), strict=True):
                own.lerp_(earlier, share)

    @torch.no_grad()
    def _settle(self, task: int) -> None:
        """Adds the trained adapter to the mean; with ``repeated_merge`` the mean before takes its place."""
        for layer, mean in zip(self.layers, self.means, strict=True):
            for own, earlier in zip(layer.tasks[task].parameters(), mean.parameters(), strict=True):
                trained = own.clone()
                if self.config.repeated_merge and self.config.merge and task > 0:
                    own.copy_(earlier)
                earlier.lerp_(trained, 1 / (task + 1))

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Gaussians under the task's adapter, aligned heads, prototypes under the first adapter, the rows."""
        self._settle(task.index)
        features, labels = own_features(self, self._acting, task.index, loader())
        self.gaussians.add(features, labels, len(task.classes))
        if task.index > 0:
            config, mean = self.config, self.gaussians.mean
            generator = self.generator(task.index, "refit")
            align(self.heads, self.gaussians, mean, config, config.weight_decay, generator)
            features, labels = own_features(self, self._acting, 0, loader())
        self.prototypes.add(prototypes(features, labels, len(task.classes)))
        super().consolidate(task, loader)

    def encode(self, images: Tensor) -> Encoding:
        """Passes until an image's adapter is that of its answer, or the rounds are over.

        An image that has found its adapter meets it again in the rounds that are left, and nothing changes.
        """
        if not self.heads.tasks:
            return Encoding(self.backbone(images).float())
        look, row_task = self._look(images), row_tasks(self.heads)
        chosen = torch.zeros(images.shape[0], dtype=torch.long, device=images.device)
        first = features = look(chosen)
        with torch.autocast(images.device.type, enabled=False):
            similar = cosines(self.final(first), self.prototypes.mean.to(images.device))
        found = row_task[similar.argmax(1)]
        for _ in range(self.config.rounds):
            chosen, features = found, look(found)
            with torch.autocast(images.device.type, enabled=False):
                logits: Tensor = self.heads(features)
            found = row_task[logits.argmax(1)]
        answer = logits.softmax(1)
        if self.config.ensemble:
            tasks = len(known_tasks(self.heads))
            answer = (answer + (tasks * similar).softmax(1)) / 2
        return Encoding(features, chosen=chosen, logits=answer.clamp(min=1e-30).log())

    def _look(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Tasks (n,) -> features (n, row_dim) under their adapters; few adapters make all of them first."""
        used = self._adapters_used
        if len(used) > 1 + self.config.rounds:
            return partial(under, self, self._acting, images)
        every = torch.stack([under(self, self._acting, images, task) for task in used])
        place = torch.zeros(len(self.heads.tasks), dtype=torch.long, device=images.device)
        place[torch.tensor(used, device=images.device)] = torch.arange(len(used), device=images.device)
        return lambda tasks: picked(every, place[tasks])

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, row_dim), each image under the adapter that it has found."""
        return self.encode(images).features

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task also its adapter, but for the first, under which prototypes lie."""
        super().forget(task, kept)
        if task > 0 and not bool(kept.any()):
            clear(self.layers, task)
