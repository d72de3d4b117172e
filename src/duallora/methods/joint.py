"""Joint training: one LoRA on the images of all tasks together, the upper bound of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.head_starts import imprint, lead, settle
from duallora.methods.interface import Loader, TaskInfo


@dataclass(frozen=True)
class JointConfig(AdapterFields, MethodConfig):
    """Fields of joint training: those of every adapter."""

    head_learning_rate: float = 1e-3


class Joint(Method):
    """``y = x W_0 + (x A) B`` on all images at once: nothing can be forgotten. Class model as DualLoRA's.

    A stream reaches it as a single task (:func:`duallora.streams.all_at_once`); a second task is refused.
    """

    paper = "joint training (upper bound)"
    stores = "one A and B, one head, class rows"
    all_at_once = True
    readout: ClassVar[Literal["heads", "calibrated"]] = "calibrated"
    imprinted: ClassVar[bool] = True
    config: JointConfig

    def __init__(
        self, backbone: Backbone, config: JointConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.attach_lora(config)

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """One pass for the rows; the head is their classifier, but does not lead the training."""
        super().prepare(task, loader)
        imprint(self, task, *self.observe(loader))
        lead(self, task)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass; the head becomes the classifier of the rows."""
        super().consolidate(task, loader)
        settle(self, task)
