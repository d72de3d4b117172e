"""Joint training: one LoRA on the images of all tasks together, the upper bound of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duallora.adapters.lora import LowRank
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext


@dataclass(frozen=True)
class JointConfig(MethodConfig):
    """Fields of joint training.

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


class Joint(Method):
    """``y = x W_0 + (x A) B`` and one head over all classes, trained on all images: nothing can be forgotten.

    A stream reaches it as a single task (:func:`duallora.streams.all_at_once`); a second task is refused.
    """

    paper = "joint training (upper bound)"
    stores = "one A and B, one head, class rows"
    all_at_once = True
    config: JointConfig

    def __init__(
        self, backbone: Backbone, config: JointConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator = self.generator(0, purpose=1)
        self.attach(
            config.first_adapted_layer,
            config.projections,
            lambda dim, out: LowRank(dim, out, config.rank, generator),
        )
