"""Sequential LoRA: one adapter that goes on learning from task to task, without any protection. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from duallora.adapters.inject import wrap_attention
from duallora.adapters.lora import AdaptedQKV
from duallora.backbones import Backbone
from duallora.methods.base import Loader, Method, MethodConfig, TaskInfo
from duallora.methods.duallora import adapted_layers
from duallora.relevance import part


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Fields of sequential LoRA.

    Attributes:
        rank: with ``residual_rank`` the rank: as many parameters as DualLoRA trains in a task, and A.
        residual_rank: see ``rank``.
        projections: which of q, k and v are adapted.
        first_adapted_layer: layers below carry no adapter; null is ``max(1, depth // 3)``.
        learning_rate: Adam's learning rate of the adapter, cosine to zero.
    """

    rank: int = 10
    residual_rank: int = 10
    projections: Literal["kv", "qv", "qkv"] = "kv"
    first_adapted_layer: int | None = None
    learning_rate: float = 2e-3


class LoRA(Method):
    """``y = x W_0 + (x A) B`` in every adapted layer; A and B are trained in every task."""

    config: LoRAConfig

    def __init__(self, backbone: Backbone, config: LoRAConfig, seed: int) -> None:
        super().__init__(backbone, config, seed)
        layers, rank = (
            adapted_layers(backbone, config.first_adapted_layer),
            config.rank + config.residual_rank,
        )
        self.adapted = wrap_attention(backbone, layers, lambda qkv: AdaptedQKV(qkv, [config.projections]))
        generator = self.generator(0)
        for module in self.adapted.values():
            bound = module.dim**-0.5  # Kaiming's bound for fan-in d with LoRA's a = sqrt(5)
            a = torch.empty(module.dim, rank).uniform_(-bound, bound, generator=generator).to(self.device)
            module.groups[config.projections].begin(0, a, a[:, :0], train_a=True)

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Opens the head and notes where the task starts."""
        super().prepare(task, loader)
        self._start = self._updates()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A and B of every layer beside the head."""
        adapters = [p for m in self.adapted.values() for p in m.parameters() if p.requires_grad]
        return [*super().parameter_groups(), {"params": adapters, "lr": self.config.learning_rate}]

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Rows of the task; the norm is that of what the task changed."""
        super().consolidate(task, loader)
        frozen = [m.frozen_weight(self.config.projections).norm() for m in self.adapted.values()]
        moved = [
            float((now - was).norm() / w)
            for now, was, w in zip(self._updates(), self._start, frozen, strict=False)  # none at rank 0
        ]
        self.orthogonal_norm = sum(moved) / len(frozen)

    def state(self) -> dict[str, Tensor]:
        """A and B of every layer beside heads and rows."""
        tensors = super().state()
        for layer, module in self.adapted.items():
            tensors |= {
                f"layers.{layer}.{name}": p.detach()
                for name, p in module.named_parameters()
                if p.requires_grad
            }
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave."""
        super().load_state(tensors)
        for layer, module in self.adapted.items():
            own = part(tensors, f"layers.{layer}")
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(own[name])

    @torch.no_grad()
    def _updates(self) -> list[Tensor]:
        adapters = [m.groups[self.config.projections] for m in self.adapted.values()]
        return [a.a @ a.b for a in adapters if a.a is not None and a.b is not None]
