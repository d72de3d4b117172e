"""Joint training: one LoRA on the images of all tasks together, the upper bound of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext


@dataclass(frozen=True)
class JointConfig(AdapterFields, MethodConfig):
    """Fields of joint training: those of every adapter."""


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
        self.attach_lora(config)
