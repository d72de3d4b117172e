"""Sequential LoRA: one adapter that goes on learning from task to task, without any protection. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duallora.adapters.lora import LowRank
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Fields of sequential LoRA.

    Attributes:
        rank: r, rank of the adapter.
        projections: which of q, k and v are adapted.
        first_adapted_layer: layers below carry no adapter; null is ``max(1, depth // 3)``.
        learning_rate: learning rate of the adapter.
    """

    rank: int = 20
    projections: Literal["kv", "qv", "qkv"] = "kv"
    first_adapted_layer: int | None = None
    learning_rate: float = 2e-3


class LoRA(Method):
    """``y = x W_0 + (x A) B`` in every adapted layer; A and B are trained in every task."""

    paper = "Hu et al. 2022 (2106.09685), used sequentially"
    stores = "one A and B, heads, class rows"
    config: LoRAConfig

    def __init__(
        self, backbone: Backbone, config: LoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator = self.generator(0, purpose=1)
        self.attach(
            config.first_adapted_layer,
            config.projections,
            lambda dim, out: LowRank(dim, out, config.rank, generator),
        )
