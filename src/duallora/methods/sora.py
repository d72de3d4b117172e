"""SoRA: a LoRA with a gate on its ranks that a proximal step drives to exact zero. Protects no old task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.lora import kaiming
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig, epochs_for
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Loader, TaskInfo
from duallora.methods.schedules import count_images, rate_share


@dataclass(frozen=True)
class SoRAConfig(AdapterFields, MethodConfig):
    """Fields of SoRA.

    Attributes:
        rank: r_max, number of gated ranks at the start of every task.
        sparsity: lambda at the end of a task; it rises from 0 in equal steps, and after each optimiser step
            the gate shrinks by lambda times the learning rate of that step.
        learning_rate: learning rate of A, B and the gate.
    """

    sparsity: float = 3.0


class Gated(nn.Module):
    """``((x A) * g) B`` with as many ranks as :meth:`open` and :meth:`prune` left; none at first.

    Args:
        dim: d.
        out: columns written.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.dim, self.out = dim, out
        self.a, self.g, self.b = self._parameters_of(torch.zeros(dim, 0), torch.zeros(0), torch.zeros(0, out))

    @staticmethod
    def _parameters_of(*tensors: Tensor) -> list[nn.Parameter]:
        return [nn.Parameter(tensor.detach()) for tensor in tensors]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out)."""
        return ((x @ self.a) * self.g) @ self.b

    def delta_weight(self) -> Tensor:
        """``A diag(g) B`` (d x out)."""
        return (self.a * self.g) @ self.b

    def open(self, rank: int, generator: torch.Generator) -> None:
        """Fills up to ``rank``: A drawn as in LoRA, g from N(0, 1), B zero, so that the output stays."""
        new = max(rank - len(self.g), 0)
        a, g = kaiming(self.dim, new, generator), torch.randn(new, generator=generator)
        b, device = torch.zeros(new, self.out), self.g.device
        self.a, self.g, self.b = self._parameters_of(
            torch.cat([self.a, a.to(device)], 1),
            torch.cat([self.g, g.to(device)]),
            torch.cat([self.b, b.to(device)]),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Makes room for as many ranks as are loaded."""
        rank = len(state_dict.get(f"{prefix}g", self.g))
        shapes = (self.dim, rank), (rank,), (rank, self.out)
        self.a, self.g, self.b = self._parameters_of(*map(self.g.new_empty, shapes))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Proximal map of ``threshold |g|_1``: ``sign(g) max(|g| - threshold, 0)``."""
        self.g.copy_(F.softshrink(self.g, threshold))

    def prune(self) -> None:
        """Drops the columns of A and rows of B whose gate is exactly zero."""
        kept = self.g.detach() != 0
        self.a, self.g, self.b = self._parameters_of(self.a[:, kept], self.g[kept], self.b[kept])


class SoRA(Method):
    """``dW = A diag(g) B``; each task trains from r_max ranks, and what its gate has closed is dropped."""

    paper = "SoRA, Ding et al. 2023 (2311.11696), used sequentially"
    stores = "one A, g and B without closed ranks, heads, class rows"
    config: SoRAConfig

    def __init__(
        self, backbone: Backbone, config: SoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.attach(config.first_adapted_layer, config.projections, Gated)
        self.updates = [update for update in self.adapters.values() if isinstance(update, Gated)]
        self.step = self.steps = self.epochs = 0

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Counts the task's optimiser steps, for the schedule, and opens the ranks that were dropped.

        Here and not in ``grow``, because how many are missing depends on what was learned.
        """
        super().prepare(task, loader)
        if len(task.classes) == 1:
            return  # nothing will be trained
        images = count_images(loader)
        self.epochs = epochs_for(self.config, images, task.index)
        self.step, self.steps = 0, self.epochs * math.ceil(images / self.config.step_images)
        generator = self.generator(task.index, "adapter")
        for update in self.updates:
            update.open(self.config.rank, generator)

    def threshold(self, step: int) -> float:
        """``lambda_s eta_s`` after step s, from 0: lambda rises linearly, eta is the training's rate."""
        config = self.config
        share = rate_share(config.schedule, step, self.steps, self.epochs)
        return config.sparsity * (step + 1) / self.steps * config.learning_rate * share

    def after_step(self) -> None:
        """The gate's proximal step."""
        for update in self.updates:
            update.shrink(self.threshold(self.step))
        self.step += 1

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Drops closed ranks, then merges and remembers the rows."""
        for update in self.updates:
            update.prune()
        super().consolidate(task, loader)

    def pretend(self, task: int) -> None:
        """All ranks open, the most that can be left."""
        for update in self.updates:
            update.open(self.config.rank, self.generator(0, "measurement"))
