"""What a method is: five hooks around one task, and the readouts that every method has.

Order of the calls for one task::

    prepare(task, loader)      passes without gradients over the evaluation views; opens head and adapters
    loss(batch); after_step()  once per optimiser step, on augmented views (skipped for a single class)
    consolidate(task, loader)  after training: merge, measure, update what is remembered
    logits(images)             any time: the readouts of a batch, without the task
    state() / load_state()     between tasks only
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.backbones import Backbone
from duallora.class_model import RandomFeatureModel
from duallora.errors import DualLoRAError
from duallora.heads import Heads, calibrate
from duallora.memory import ClassMoments, RowMemory
from duallora.relevance import part


class Batch(NamedTuple):
    """Images (B, 3, H, W), labels inside the task (B,) and indices of the samples in its data set (B,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


# A fresh pass over the task's training images, evaluation view, in order.
Loader = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class TaskInfo:
    """A task as a method sees it: its index (from 0), name and class names."""

    index: int
    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class MethodConfig:
    """Fields that every method has.

    Attributes:
        epochs: passes over a task's training images.
        batch_size: images per optimiser step.
        head_learning_rate: Adam's learning rate of the heads, cosine to zero.
        calibration: how the calibrated readout joins heads, class model and task identity.
        tau: weight of the task posterior with ``calibration="task"``.
        class_model: posterior over rows on the final feature.
        random_features: number of random features with ``class_model="random_features"``.
        ridge: their ridge; null chooses it by generalised cross-validation.
    """

    epochs: int = 4
    batch_size: int = 32
    head_learning_rate: float = 5e-3
    calibration: Literal["class", "task", "none"] = "class"
    tau: float = 1.0
    class_model: Literal["gaussian", "random_features"] = "gaussian"
    random_features: int = 2000
    ridge: float | None = None

    def __post_init__(self) -> None:
        """Refuses values outside what a field allows.

        Raises:
            DualLoRAError: naming the field, the value and what is valid.
        """
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_field(field.name, getattr(self, field.name), hints[field.name])


_POSITIVE = {
    "epochs",
    "batch_size",
    "head_learning_rate",
    "learning_rate",
    "random_features",
    "top_tasks",
    "ridge",
}


def _check_field(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in kinds:
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
        raise DualLoRAError(f"{name} must be a {'whole' if kind is int else 'finite'} number, not {value!r}.")
    positive = name in _POSITIVE
    if value < 0 or (positive and value == 0):
        raise DualLoRAError(f"{name} must be {'above' if positive else 'at least'} 0, not {value}.")


@dataclass(frozen=True)
class Readout:
    """What a method says of a batch: n images, R rows in the order of the tasks, T tasks; fp32 logs.

    Attributes:
        heads: log-softmax over the concatenated heads (n, R).
        calibrated: calibrated log-probabilities of the rows (n, R); None with ``calibration="none"``.
        task_posterior: log p(t|f) (n, T).
        familiarity: how well the final feature fits any row (n,), in [0, 1].
        gate: weights of the residual adapters (n, T), in [0, 1]; None where a method has none.
        features: final features (n, d).
    """

    heads: Tensor
    calibrated: Tensor | None
    task_posterior: Tensor
    familiarity: Tensor
    gate: Tensor | None
    features: Tensor


class Method:
    """Heads and class rows on the final feature of a frozen backbone; subclasses add adapters to it.

    Args:
        backbone: frozen; already on its device.
        config: the method's fields.
        seed: every draw is keyed by it and the task.

    Attributes:
        readout: which readout is the method's own answer.
        autocast: precision of the backbone in passes and training; everything else runs in fp32.
        forward_passes: backbone passes per image at inference.
        orthogonal_norm: norm of the latest task's (merged) update over that of ``W_0``, mean over adapted
            layers; None without.
        residual_norm: the same for the gated update.
    """

    readout: ClassVar[Literal["heads", "calibrated"]] = "heads"
    forward_passes: ClassVar[int] = 1

    def __init__(self, backbone: Backbone, config: MethodConfig, seed: int) -> None:
        if backbone.taken:
            raise DualLoRAError(
                "this backbone belongs to another learner; load it again with load_backbone()."
            )
        backbone.taken = True
        self.backbone, self.config, self.seed = backbone, config, seed
        self.device = next(backbone.parameters()).device
        self.heads = Heads(backbone.feature_dim, self.device)
        self.rows = RowMemory(backbone.feature_dim, self.device)
        self.random: RandomFeatureModel | None = None
        if config.class_model == "random_features":
            self.random = RandomFeatureModel(
                backbone.feature_dim, config.random_features, config.ridge, seed, self.device
            )
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.orthogonal_norm: float | None = None
        self.residual_norm: float | None = None

    @property
    def answer(self) -> Literal["heads", "calibrated"]:
        """The readout that predictions are read from: plain heads when nothing is calibrated."""
        return "heads" if self.config.calibration == "none" else self.readout

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Before training: opens the task's head."""
        self.heads.open(len(task.classes), self.generator(task.index))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of the current task with their learning rates, as an optimiser takes them."""
        return [{"params": list(self.heads.tasks[-1].parameters()), "lr": self.config.head_learning_rate}]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the classes of the current task only."""
        return F.cross_entropy(self.heads.current(self.features(batch.images)), batch.labels)

    def features(self, images: Tensor) -> Tensor:
        """Final features (n, d), fp32, as passes and training see them."""
        with self.autocast():
            features: Tensor = self.backbone(images)
        return features.float()

    def after_step(self) -> None:
        """After an optimiser step: constraints on parameters."""

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """After training: one pass over the task's images for the rows on the final feature."""
        features, labels = self.observe(loader)
        self.remember(task, features, labels)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Readout:
        """Readouts of a batch (B, 3, H, W); the answer for an image does not depend on the others."""
        features, config = self.backbone(images).float(), self.config  # fp32: bf16 would round by batch size
        logits = self.heads(features)
        log_q = self.rows.log_q(features) if self.random is None else self.random.log_q(features)
        log_task = self.task_posterior(log_q)
        calibrated = None
        if config.calibration != "none":
            row_task = self.rows.task.to(self.device)
            calibrated = calibrate(logits, log_q, log_task, row_task, config.calibration, config.tau)
        familiarity = self.rows.familiarity(features)
        return Readout(
            logits.log_softmax(1), calibrated, log_task, familiarity, self.gate_weights(), features
        )

    def task_posterior(self, log_q: Tensor) -> Tensor:
        """Log p(t|f) (n, T) from the posterior over rows (n, R)."""
        return self.rows.by_task(log_q)

    def gate_weights(self) -> Tensor | None:
        """Weights of the residual adapters in the latest forward pass (n, T)."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Everything learned so far, by name; valid between tasks."""
        tensors = {f"heads.{name}": x for name, x in self.heads.state_dict().items()}
        tensors |= {f"rows.{name}": x for name, x in self.rows.state().items()}
        if self.random is not None:
            tensors |= {f"random.{name}": x for name, x in self.random.state().items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave; tensors are on the CPU."""
        self.heads.load_state(part(tensors, "heads"))
        self.rows.load_state(part(tensors, "rows"))
        if self.random is not None:
            self.random.load_state(part(tensors, "random"))

    def remember(self, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        """Adds the task's rows on the final feature (n, d) and fits their temperature; called once a task."""
        self.rows.replace(task.index, ClassMoments.of(features, labels, len(task.classes)))
        self.rows.fit(task.index, features, labels)
        if self.random is not None:
            self.random.add(task.index, features, labels, len(task.classes))

    @torch.no_grad()
    def observe(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """One pass over the task's images: final features (n, d) and labels (n,)."""
        features, labels = zip(*((self.features(b.images), b.labels) for b in loader()), strict=True)
        return torch.cat(features), torch.cat(labels)

    def generator(self, task: int) -> torch.Generator:
        """Random numbers for a task's initialisation, the same on every device and after every resume."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + task)
