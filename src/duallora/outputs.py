"""What a learner gives back: records of tasks, raw outputs, evaluations, predictions."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.runtime import parallel


@dataclass(frozen=True)
class TaskRecord:
    """One learned task; saved with the model.

    Attributes:
        name: given by the user, unique in a model.
        classes: class names in the order of the task's rows.
        learned_at: UTC, ISO 8601.
        train_images: number of training images.
        prepare_seconds: pass before training, with the bases.
        learn_seconds: training.
        consolidate_seconds: merge and pass after training.
        trainable_parameters: trained in this task; 0 where training was skipped.
        stored_bytes: of the whole saved state after this task, the backbone left out.
        orthogonal_norm: norm of the task's merged update over that of ``W_0``, mean over adapted layers; None
            without.
        residual_norm: the same for the gated update.
        epochs: passes of the training; 0 where it was skipped.
        kept_epoch: the one whose adapters and head were kept, from 1.
        kept_accuracy: share of the images held back for that choice which the head, among the classes of the
            task, named rightly then; None where none were given.
        kept_images: how many these were.
        held_back_accuracy: share of the task's held-back images that were named rightly among all classes
            known on that day; None where it was not measured.
        held_back_images: how many these were.
        unknown_below: familiarity above which 95 % of new images of the classes lie, judged by these; None
            where they are fewer than two.
    """

    name: str
    classes: tuple[str, ...]
    learned_at: str
    train_images: int
    prepare_seconds: float
    learn_seconds: float
    consolidate_seconds: float
    trainable_parameters: int
    stored_bytes: int
    orthogonal_norm: float | None
    residual_norm: float | None
    epochs: int = 0
    kept_epoch: int = 0
    kept_accuracy: float | None = None
    kept_images: int = 0
    held_back_accuracy: float | None = None
    held_back_images: int = 0
    unknown_below: float | None = None

    @property
    def forgotten(self) -> bool:
        """Whether the task has been taken back; what is left is its place in the order."""
        return not self.classes

    def figures(self, number: int) -> dict[str, float]:
        """What of it a logger shows, by name.

        Args:
            number: of the task, from 1.
        """
        found = {"norm/orthogonal": self.orthogonal_norm, "norm/residual": self.residual_norm}
        known = {name: value for name, value in found.items() if value is not None}
        return {"task": float(number), "stored MB": self.stored_bytes / 1e6, **known}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TaskRecord:
        """The inverse of :meth:`to_dict`."""
        return cls(**(record | {"classes": tuple(record["classes"])}))


def free_name(base: str, taken: Collection[str]) -> str:
    """A name for a task: ``base``, with a number from 2 on where a task of that name is there."""
    numbered = (f"{base} {number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in taken)


def new_name(name: str | None, tasks: Sequence[TaskRecord]) -> str:
    """The name of a task to be learned: as asked for, or ``task N`` with the first N that is free.

    Raises:
        DualLoRAError: a task has that name already.
    """
    taken = {task.name for task in tasks}
    if name in taken:
        raise DualLoRAError(f"a task named {name!r} has been learned already; give this one another name.")
    numbered = (f"task {number}" for number in itertools.count(len(tasks) + 1))
    return name if name is not None else next(free for free in numbered if free not in taken)


def unknown_thresholds(tasks: Iterable[TaskRecord]) -> dict[str, float]:
    """By the name of each task the familiarity below which an image that is given to it is called unknown.

    It is the one found on the task's held-back images. A task without such images has the mean of the others,
    each weighted by its images.

    Raises:
        DualLoRAError: no task has held-back images.
    """
    tasks = list(tasks)
    mean = mean_threshold(tasks)
    if mean is None:
        raise DualLoRAError(
            "no lesson of this model had images held back, so none say what is unknown: give a number, such "
            "as --unknown-below 0.2, or teach the next lesson with images in val/."
        )
    return {task.name: mean if task.unknown_below is None else task.unknown_below for task in tasks}


def mean_threshold(tasks: Iterable[TaskRecord]) -> float | None:
    """One familiarity for all tasks: the mean of theirs, each weighted by its held-back images.

    None where no task has held-back images.
    """
    found = [(t.unknown_below, max(t.held_back_images, 1)) for t in tasks if t.unknown_below is not None]
    return sum(below * images for below, images in found) / sum(n for _, n in found) if found else None


def rows_of(tasks: Sequence[TaskRecord], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Task and class of each row, both (R,): a row is a class of a task, in the order of learning."""
    number = {name: i for i, name in enumerate(classes)}
    rows = [(t, number[name]) for t, task in enumerate(tasks) for name in task.classes]
    return torch.tensor([t for t, _ in rows]), torch.tensor([c for _, c in rows])


@dataclass(frozen=True)
class Outputs:
    """Raw outputs on the CPU: n images, R rows (a row is a class of a task), T tasks.

    Attributes:
        heads: log-softmax over the concatenated heads (n, R).
        calibrated: calibrated log-probabilities of the rows (n, R), or None with ``calibration="none"``.
        task_posterior: log p(t|f) (n, T).
        familiarity: how well an image fits anything learned (n,), in [0, 1].
        gate: weights of the residual adapters (n, T), or None where a method has none.
        features: final features (n, d).
        row_task: task of each row (R,).
        row_class: class of each row (R,), index into ``ContinualLearner.classes``.
        readout: the readout that is the method's own answer.
    """

    heads: Tensor
    calibrated: Tensor | None
    task_posterior: Tensor
    familiarity: Tensor
    gate: Tensor | None
    features: Tensor
    row_task: Tensor
    row_class: Tensor
    readout: str

    def gathered(self) -> Outputs:
        """The outputs of all processes' images, in the order of the processes."""
        return replace(
            self,
            heads=parallel.gather(self.heads),
            calibrated=None if self.calibrated is None else parallel.gather(self.calibrated),
            task_posterior=parallel.gather(self.task_posterior),
            familiarity=parallel.gather(self.familiarity),
            gate=None if self.gate is None else parallel.gather(self.gate),
            features=parallel.gather(self.features),
        )


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on the images whose class belongs to a task (the latest one that has the class)."""

    name: str
    accuracy: float | None
    images: int


@dataclass(frozen=True)
class Mistake:
    """A wrong answer.

    Attributes:
        index: of the image in its data set.
        true: its class.
        answer: the class that it was given.
        probability: of the answer.
        probability_of_true: of the true class.
    """

    index: int
    true: str
    answer: str
    probability: float
    probability_of_true: float


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on labelled images.

    Attributes:
        accuracy: share of images whose class is right.
        tasks: the same per task.
        task_confusion: T x T counts, row = task of the true class, column = task that ``predict`` names.
        calibration_error: expected calibration error of the top class probability, 15 equal-width bins.
        images: number of images.
        mistakes: every wrong answer, the surest first.
    """

    accuracy: float
    tasks: tuple[TaskAccuracy, ...]
    task_confusion: tuple[tuple[int, ...], ...]
    calibration_error: float | None
    images: int
    mistakes: tuple[Mistake, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What the learner says of one image.

    Attributes:
        path: file of the image, or None if it did not come from a file.
        label: most probable class name.
        probability: its probability, summed over the tasks that taught it.
        task: most probable task: arg-max of p(t|f), or of the heads' sums where plain heads answer;
            it need not be that of the most probable row.
        task_confidence: its probability.
        unknown: 1 - familiarity: how little the image fits anything learned.
        top: class names and probabilities, best first.
    """

    path: str | None
    label: str
    probability: float
    task: str
    task_confidence: float
    unknown: float
    top: tuple[tuple[str, float], ...]
