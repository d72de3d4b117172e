"""Joint training: one LoRA on the images of all tasks together, the upper bound of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from duallora.adapters.lora import LowRank
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Loader, Method, TaskInfo
from duallora.methods.config import MethodConfig


@dataclass(frozen=True)
class JointConfig(MethodConfig):
    """Fields of joint training.

    Attributes:
        rank: r, rank of the adapter.
        projections: which of q, k and v are adapted.
        first_adapted_layer: layers below carry no adapter; null is ``max(1, depth // 3)``.
        learning_rate: learning rate of the adapter.
    """

    head_learning_rate: float = 1e-3
    rank: int = 20
    projections: Literal["kv", "qv", "qkv"] = "kv"
    first_adapted_layer: int | None = None
    learning_rate: float = 2e-3


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

    def __init__(self, backbone: Backbone, config: JointConfig, seed: int) -> None:
        super().__init__(backbone, config, seed)
        generator = self.generator(0, purpose=1)
        self.attach(
            config.first_adapted_layer,
            config.projections,
            lambda dim, out: LowRank(dim, out, config.rank, generator),
        )

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: the head starts as the classifier of the rows."""
        super().prepare(task, loader)
        self.imprint(task, *self.observe(loader))
