"""What goes into a method and comes out of it: tasks and batches, passes and readouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Images (B, 3, H, W), labels inside the task (B,) and indices of the samples in its data set (B,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


# A fresh pass over the task's training images, evaluation view, in order. Where several processes train, each
# sees its block of them: what a method keeps of a pass goes through duallora.runtime.parallel.
Loader = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class TaskInfo:
    """A task as a method sees it: its index (from 0), name and class names."""

    index: int
    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Encoding:
    """What one forward pass gives of n images: features, and what the method chose by the image.

    Attributes:
        features: of the adapted model (n, row_dim), fp32; the final feature comes first.
        gate: weights of the residual adapters (n, T), in [0, 1]; None where a method has none.
        gate_features: what the gate read (n, m d), by layer.
        chosen: the task whose adapter acted on each image (n,); None where a method does not choose one.
        logits: of all rows (n, R), where they come of more than these features; None elsewhere.
    """

    features: Tensor
    gate: Tensor | None = None
    gate_features: Mapping[int, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class BatchOutputs:
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


@dataclass(frozen=True)
class AdaptedPlace:
    """What a saved model holds beside some projections of one layer.

    Attributes:
        layer: index of the block.
        projections: over ``q``, ``k`` and ``v``.
        rank: of the update that is added to the frozen weight.
        residual_ranks: of the residual adapters, one each.
        bases: directions that each task added to those that are protected.
        free: directions that no task uses; None without a basis.
    """

    layer: int
    projections: str
    rank: int
    residual_ranks: list[int]
    bases: list[int]
    free: int | None
