"""Sequential LoRA: one adapter that goes on learning from task to task, without any protection. A control."""

from __future__ import annotations

from dataclasses import dataclass

from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext


@dataclass(frozen=True)
class LoRAConfig(AdapterFields, MethodConfig):
    """Fields of sequential LoRA: those of every adapter."""


class LoRA(Method):
    """``y = x W_0 + (x A) B`` in every adapted layer; A and B are trained in every task."""

    paper = "Hu et al. 2022 (2106.09685), used sequentially"
    stores = "one A and B, heads, class rows"
    config: LoRAConfig

    def __init__(
        self, backbone: Backbone, config: LoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.attach_lora(config)
