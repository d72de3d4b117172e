"""C-LoRA: one low-rank pair for all tasks and a routing matrix inside it. Not ``clora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duallora.adapters.lora import kaiming
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Loader, TaskInfo


@dataclass(frozen=True)
class RoutedLoRAConfig(AdapterFields, MethodConfig):
    """Fields of C-LoRA.

    Attributes:
        rank: r, rank of the shared pair A, B and size of the routing matrix R (r x r).
        orthogonality: lambda, weight of the penalty that keeps R_delta orthogonal to R_old.
        shared_rate: learning rate of A and B after the first task, as a share of ``learning_rate``.
    """

    orthogonality: float = 0.01
    shared_rate: float = 0.1


class Routed(nn.Module):
    """``x A (R_old + R_delta) B``: A (d x r) drawn, B (r x out) zero, R_old the identity, R_delta zero.

    Args:
        dim: d.
        out: columns written.
        rank: r.
        generator: draws A.
    """

    def __init__(self, dim: int, out: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(kaiming(dim, rank, generator))
        self.b = nn.Parameter(torch.zeros(rank, out))
        self.r_delta = nn.Parameter(torch.zeros(rank, rank))
        self.r_old: Tensor
        self.register_buffer("r_old", torch.eye(rank))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out)."""
        return ((x @ self.a) @ (self.r_old + self.r_delta)) @ self.b

    def delta_weight(self) -> Tensor:
        """``A R B`` (d x out)."""
        return self.a @ (self.r_old + self.r_delta) @ self.b

    def overlap(self) -> Tensor:
        """``|R_old^T R_delta|_F^2 + |R_old R_delta^T|_F^2``."""
        shared: Tensor = (self.r_old.T @ self.r_delta).square().sum()
        return shared + (self.r_old @ self.r_delta.T).square().sum()

    @torch.no_grad()
    def absorb(self) -> None:
        """``R_old += R_delta``, which leaves R as it was, and R_delta is zero again."""
        self.r_old += self.r_delta
        self.r_delta.zero_()


class RoutedLoRA(Method):
    """``dW = A (R_old + R_delta) B``: R_old is frozen, R_delta is what a task trains.

    A and B are trained in full in the first task that trains at all and slowly afterwards, and only from the
    second such task on is there an R_old worth a penalty.
    """

    paper = "C-LoRA, Zhang et al. 2025 (2502.17920)"
    stores = "one A, R and B, heads, class rows"
    reconstruction = True
    config: RoutedLoRAConfig

    def __init__(
        self, backbone: Backbone, config: RoutedLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator = self.generator(0, "adapter")
        self.attach(
            config.first_adapted_layer,
            config.projections,
            lambda dim, out: Routed(dim, out, config.rank, generator),
        )
        self.updates = [update for update in self.adapters.values() if isinstance(update, Routed)]
        self.later = False  # whether an earlier task has trained the pair

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Looks whether the pair has been trained: B is zero until then, also after tasks of one class."""
        super().prepare(task, loader)
        self.later = any(bool(update.b.any()) for update in self.updates)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Head; R_delta at the full rate; A and B at the full rate once, then at a share of it."""
        head, _ = super().parameter_groups()
        rate = self.config.learning_rate
        shared = rate * self.config.shared_rate if self.later else rate
        return [
            head,
            {"params": [update.r_delta for update in self.updates], "lr": rate},
            {"params": [p for update in self.updates for p in (update.a, update.b)], "lr": shared},
        ]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, and from the second trained task on lambda times the overlap of all layers."""
        loss = super().loss(batch)
        if not self.later:
            return loss
        overlaps = torch.stack([update.overlap() for update in self.updates])
        return loss + self.config.orthogonality * overlaps.sum()

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """``R_old += R_delta``, then the rows."""
        for update in self.updates:
            update.absorb()
        super().consolidate(task, loader)
