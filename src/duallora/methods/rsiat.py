"""RSIAT: SSIAT whose first task steers the features apart, and whose later tasks are held by a projector.

"Representation-Steered Incremental Adapter-Tuning for Class-Incremental Learning with Pre-Trained Models"
(CVPR 2026).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.bottleneck import Bottleneck
from duallora.adapters.lora import kaiming
from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians
from duallora.classifiers.cosine import cosface_logits, cosines, current_cosines, head_cosines
from duallora.methods.base import Method
from duallora.methods.config import BottleneckFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.methods.schedules import count_images
from duallora.methods.shifted_prototypes import ShiftFields, settle

_NARROW = 64  # hidden width of the released projector on either side of its code


@dataclass(frozen=True)
class RSIATConfig(ShiftFields, BottleneckFields, MethodConfig):
    """Fields of RSIAT: those of SSIAT, and of what it adds to the loss.

    Attributes:
        steering: weight of the loss that steers features of the first task.
        push: weight in it of pairs of different classes.
        steering_margin: cosine that features of different classes may have for free.
        warmup_epochs: epochs over which ``steering`` rises from 0, epoch by epoch.
        retention: weight of the distance to the projected features of the model before the task.
        separation: weight of the cosine between these and the projected prototypes of earlier classes.
        projector_code: width of the projector's middle layer.
        projector_learning_rate: its learning rate.
        projector_weight_decay: its weight decay.
    """

    positive: ClassVar[tuple[str, ...]] = ("projector_code", "projector_learning_rate")

    cosine_scale: float = 50.0
    margin: float = 0.2
    steering: float = 0.5
    push: float = 1.5
    steering_margin: float = 0.4
    warmup_epochs: int = 1
    retention: float = 3.0
    separation: float = 1.5
    refit_epochs: int = 10
    projector_code: int = 384
    projector_learning_rate: float = 1.7e-4
    projector_weight_decay: float = 4.1e-3


class Projector(nn.Module):
    """``x + sigmoid(MLP(x))`` with layers d, 64, code, 64, d and GELU between them.

    Args:
        dim: d.
        code: width of the middle layer.
        generator: draws weights and biases as torch draws a linear layer's.
    """

    def __init__(self, dim: int, code: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inner, outer in pairwise((dim, _NARROW, code, _NARROW, dim)):
            self.weights.append(nn.Parameter(kaiming(inner, outer, generator)))
            bound = inner**-0.5
            bias = torch.empty(outer).uniform_(-bound, bound, generator=generator)
            self.biases.append(nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        *inner, last = zip(self.weights, self.biases, strict=True)
        hidden = x
        for weight, bias in inner:
            hidden = F.gelu(hidden @ weight + bias)
        y: Tensor = x + (hidden @ last[0] + last[1]).sigmoid()
        return y


class RSIAT(Method):
    """A bottleneck beside every mlp; the first task is steered, later ones are held by ``g(f')``.

    With f' the features of the model before the task and ``g`` the projector: the loss of a later task adds
    ``retention mean (f - g(f'))^2 + separation mean cos(g(mu_c), g(f'))`` over earlier classes c.
    """

    paper = "RSIAT: Zhao et al. 2026 (CVPR)"
    stores = "one bottleneck a layer, the projector, heads, a mean and covariance per class"
    config: RSIATConfig

    def __init__(
        self, backbone: Backbone, config: RSIATConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator = self.generator(0, "adapter")
        self.attach_mlp(
            config.first_adapted_layer, lambda dim: Bottleneck(dim, config.rank, config.scale, generator)
        )
        drawn = self.generator(0, "projector")
        self.projector = Projector(backbone.feature_dim, config.projector_code, drawn).to(self.device)
        self.adapters["projector"] = self.projector
        self.gaussians = Gaussians(backbone.feature_dim, heads=False)
        self.keep_by_row("gaussians", self.gaussians)
        self._start: Tensor | None = None  # features of the task's images before it is trained
        self._teacher: dict[int, nn.Module] = {}  # the bottlenecks as they were before the task
        self._prototypes = torch.zeros(0)  # of earlier classes, where the model is
        self.step, self.epoch_steps = 0, 1

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Keeps the model before the task and what it makes of its images; in the first one counts steps."""
        if task.index > 0 and len(task.classes) > 1:  # a single class is not trained: nothing will shift
            if self.config.shift:
                self._start = self.observe(loader)[0]
            for layer, wrapper in self.beside_mlp.items():
                self._teacher[layer] = copy.deepcopy(wrapper.update).requires_grad_(False)
            self._prototypes = self.gaussians.mean.to(self.device)
        elif task.index == 0 and len(task.classes) > 1:
            self.step, self.epoch_steps = 0, -(-count_images(loader) // self.config.step_images)
        super().prepare(task, loader)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight of the head, which has no bias, the adapter, from the second task on the projector."""
        config = self.config
        bottlenecks = [p for wrapper in self.beside_mlp.values() for p in wrapper.update.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [self.heads.tasks[-1].get_parameter("weight")], "lr": config.head_learning_rate},
            {"params": bottlenecks, "lr": config.learning_rate},
        ]
        if self._teacher:
            rates = {"lr": config.projector_learning_rate, "weight_decay": config.projector_weight_decay}
            groups.append({"params": list(self.projector.parameters()), **rates})
        return groups

    def current_logits(self, images: Tensor) -> Tensor:
        """Cosines (n, |Y_t|) with the weights of the current head."""
        return current_cosines(self.heads, self.features(images))

    def loss(self, batch: Batch) -> Tensor:
        """CosFace over the classes of the current task, and what steers the first or holds a later one."""
        config, f = self.config, self.final(self.features(batch.images))
        cosine = current_cosines(self.heads, f)
        logits = cosface_logits(cosine, batch.labels, config.cosine_scale, config.margin)
        loss = self.class_loss.cross_entropy(logits, batch.labels)
        if not self._teacher:
            weight = config.steering * self.warmup
            return loss + weight * steering_loss(f, batch.labels, config.push, config.steering_margin)
        with torch.no_grad(), self._as_before():
            before = self.final(self.features(batch.images))
        projected = self.projector(before)
        overlap = cosines(self.projector(self._prototypes), projected).mean()
        return loss + config.retention * F.mse_loss(f, projected) + config.separation * overlap

    @property
    def warmup(self) -> float:
        """Share of ``steering`` in the present epoch of the first task."""
        epoch = self.step // self.epoch_steps
        return 1.0 if epoch >= self.config.warmup_epochs else epoch / self.config.warmup_epochs

    def after_step(self) -> None:
        """Counts the steps of the first task."""
        self.step += 1

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Inside, the bottlenecks are those before the task."""
        trained = {layer: wrapper.update for layer, wrapper in self.beside_mlp.items()}
        try:
            for layer, wrapper in self.beside_mlp.items():
                wrapper.update = self._teacher[layer]
            yield
        finally:
            for layer, wrapper in self.beside_mlp.items():
                wrapper.update = trained[layer]

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Scaled cosines to all rows (n, R)."""
        return self.config.cosine_scale * head_cosines(self.heads, encoding.features)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: rows of earlier tasks are moved, the task's are added, then all heads are aligned."""
        settle(self, self.config, self.gaussians, task, loader, self._start)
        self._start, self._teacher, self._prototypes = None, {}, torch.zeros(0)


def steering_loss(f: Tensor, labels: Tensor, push: float, margin: float) -> Tensor:
    """Mean of ``1 - cos`` over pairs of one class, ``push`` times that of ``(cos - margin)+`` over others.

    Args:
        f: features (n, d).
        labels: (n,).
        push: weight of pairs of different classes.
        margin: cosine that these may have for free.
    """
    cosine = cosines(f, f)
    same = labels[:, None] == labels
    others = ~same
    same = same & ~torch.eye(len(f), dtype=torch.bool, device=f.device)
    pull = ((1 - cosine).relu() * same).sum() / (same.sum() + 1e-6)
    return pull + push * ((cosine - margin).relu() * others).sum() / (others.sum() + 1e-6)
