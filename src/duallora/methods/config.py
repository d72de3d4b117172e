"""Fields that every method has, and what a field may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from duallora.errors import DualLoRAError

ADDED_FIELDS = {
    "optimizer": "adam",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "min_steps": 0,
    "first_epochs": None,
    "class_weights": "none",
}
"""Fields that came after the first published results, with the values at which those were made."""


STEP_IMAGES = 32
"""Images per optimiser step, where nothing else is asked for."""

RETIRED_FIELDS = frozenset({"orthogonal_update"})
"""Fields of models saved earlier that said how a task was trained, and say nothing of what was learned."""


@dataclass(frozen=True)
class MethodConfig:
    """Fields that every method has.

    Attributes:
        epochs: passes over a task's training images.
        first_epochs: passes over those of the first task; null is ``epochs``.
        min_steps: optimiser steps that a task gets at least, by further passes: few images need as many. On
            a command line or in a file, 0 where ``epochs`` is named and this is not.
        batch_size: images per optimiser step; with auto as many as the default, on a GPU in as few pieces as
            its memory holds.
        head_learning_rate: learning rate of the heads.
        optimizer: adam, adamw, or sgd with momentum .9.
        schedule: of the learning rates over a task: one cosine to zero, none, a quarter of a cosine by epochs
            as the code of CODA-Prompt and InfLoRA has it, or a tenth in the last fifth of the epochs.
        weight_decay: of everything that is trained, as the optimizer has it.
        calibration: how the calibrated readout joins heads, class statistics and task identity.
        class_weights: of the classes in the loss: all count the same (balanced) in a task where one has more
            than three times the images of another; or none.
        tau: weight of the task posterior with ``calibration="task"``.
    """

    # Fields of this class that must be above 0; other numbers may be 0.
    positive: ClassVar[tuple[str, ...]] = (
        "epochs",
        "first_epochs",
        "batch_size",
        "head_learning_rate",
        "learning_rate",
    )

    epochs: int = 4
    first_epochs: int | None = None
    min_steps: int = 100
    batch_size: int | Literal["auto"] = STEP_IMAGES
    head_learning_rate: float = 5e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    schedule: Literal["cosine", "constant", "quarter-cosine", "step"] = "cosine"
    weight_decay: float = 0.0
    calibration: Literal["class", "task", "none"] = "class"
    class_weights: Literal["none", "balanced"] = "none"
    tau: float = 1.0

    @property
    def step_images(self) -> int:
        """Images per optimiser step, as a number."""
        return STEP_IMAGES if self.batch_size == "auto" else self.batch_size

    def __post_init__(self) -> None:
        """Refuses values outside what a field allows.

        Raises:
            DualLoRAError: naming the field, the value and what is valid.
        """
        hints = get_type_hints(type(self))
        positive = {name for kind in type(self).__mro__ for name in vars(kind).get("positive", ())}
        for field in fields(self):
            _check_field(field.name, getattr(self, field.name), hints[field.name], field.name in positive)


@dataclass(frozen=True)
class AdapterFields:
    """Fields of every low-rank adapter beside the qkv projections; goes with :class:`MethodConfig`.

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


@dataclass(frozen=True)
class BottleneckFields:
    """Fields of every AdaptFormer adapter beside the mlps; goes with :class:`MethodConfig`.

    Attributes:
        rank: r, width of the bottleneck; 30 has as many parameters as LoRA of rank 20 on two projections.
        scale: multiplies what the adapter adds.
        first_adapted_layer: layers below carry no adapter; null is ``max(1, depth // 3)``.
        learning_rate: learning rate of the adapter.
    """

    rank: int = 30
    scale: float = 0.1
    first_adapted_layer: int | None = None
    learning_rate: float = 2e-3


def epochs_for(config: MethodConfig, images: int, task: int) -> int:
    """Passes over a task of so many images that reach both its epochs and ``min_steps``; tasks from 0."""
    first = config.first_epochs if task == 0 else None
    epochs = config.epochs if first is None else first
    return max(epochs, math.ceil(config.min_steps / max(math.ceil(images / config.step_images), 1)))


def _check_field(name: str, value: Any, hint: Any, positive: bool) -> None:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    words = [word for other in kinds[1:] for word in get_args(other)]
    if value in words:
        return
    kind = kinds[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise DualLoRAError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}.")
        return
    if kind is bool:
        if not isinstance(value, bool):
            raise DualLoRAError(f"{name} must be true or false, not {value!r}.")
        return
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        wanted = " or ".join(["a whole number" if kind is int else "a finite number", *words])
        raise DualLoRAError(f"{name} must be {wanted}, not {value!r}.")
    if value < 0 or (positive and value == 0):
        raise DualLoRAError(f"{name} must be {'above' if positive else 'at least'} 0, not {value}.")
