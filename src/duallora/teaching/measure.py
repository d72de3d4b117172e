"""What one ``duallora learn`` has led to: measured before the model is saved, told afterwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import torch

from duallora.commands import console
from duallora.errors import CheckFailed
from duallora.predictions import best, calibration_error, class_probabilities
from duallora.storage.documents import percent

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import TaskRecord
    from duallora.streams import FolderDataset, TaskDataset

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracy on the ``--check`` images before and after the task."""

    before: float
    after: float

    def require(self, max_drop: float) -> None:
        """Refuses a larger drop.

        Raises:
            CheckFailed: naming both figures.
        """
        if self.before - self.after > max_drop + 1e-9:  # 0.95 - 0.93 is a little more than 0.02
            raise CheckFailed(
                f"accuracy on the --check images was {percent(self.before)} % before and "
                f"{percent(self.after)} % after, a drop of more than --max-drop {max_drop:g}; "
                "the model is as it was."
            )

    def tell(self) -> None:
        """Prints both figures."""
        before, after = percent(self.before), percent(self.after)
        console.line(f"accuracy on the --check images: {before} % before, {after} % after")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a learner says of labelled images, in one pass over them.

    Attributes:
        accuracy: share of images whose class is right.
        calibration_error: expected calibration error; None where it is undefined.
        answers: true and predicted class name of every image.
        confidence: probability of the predicted class of every image.
    """

    accuracy: float
    calibration_error: float | None
    answers: tuple[tuple[str, str], ...]
    confidence: tuple[float, ...]

    @classmethod
    def on(cls, learner: ContinualLearner, data: TaskDataset | FolderDataset | None) -> Measured | None:
        """Measures a learner on images of classes that it knows; None for no images."""
        if data is None:
            return None
        outputs = learner.outputs(data)
        confidence, found = best(class_probabilities(outputs))
        names = [(data.classes[t], learner.classes[c]) for t, c in zip(data.targets, found, strict=True)]
        right = torch.tensor([true == answer for true, answer in names])
        error = calibration_error(confidence, right)
        return cls(int(right.sum()) / len(right), error, tuple(names), tuple(confidence.tolist()))

    def note(self, learner: ContinualLearner) -> TaskRecord:
        """Puts the accuracy on held-back images into the record of the latest task, to be saved with it."""
        record = dataclasses.replace(
            learner.tasks[-1], held_back_accuracy=self.accuracy, held_back_images=len(self.answers)
        )
        learner.tasks[-1] = record
        return record


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task has led to.

    Attributes:
        held_back: on the held-back images; None where nothing was held back.
        confused: per old class, how many images were mistaken between it and new classes; None where there
            are no old or no new classes.
    """

    held_back: Measured | None
    confused: Counter[str] | None

    @classmethod
    def of(
        cls, record: TaskRecord, known: list[str], held_back: Measured | None, check: Measured | None
    ) -> Outcome:
        """Compares what was measured after a task with what was known before.

        Args:
            record: the task.
            known: the classes that the learner knew before.
            held_back: on images of the task, which it has not seen.
            check: on images of classes that it knew before.
        """
        new = set(record.classes).difference(known)
        measured = [each for each in (held_back, check) if each is not None]
        if not (known and new and measured):
            return cls(held_back, None)
        confused: Counter[str] = Counter()
        for true, found in (names for each in measured for names in each.answers):
            if (true in new) != (found in new):
                confused[found if true in new else true] += 1
        return cls(held_back, confused)

    def tell(self) -> None:
        """Prints the figures."""
        if self.held_back is None:
            console.line("held-back accuracy: not measured, no class has ten images; give some in val/")
        else:
            share, error = percent(self.held_back.accuracy), self.held_back.calibration_error
            console.line(f"held-back accuracy: {share} % on {len(self.held_back.answers)} images")
            console.line(f"calibration error: {'-' if error is None else f'{error:.3f}'}")
        if self.confused is not None:
            worst = ", ".join(f"{name} ({count})" for name, count in self.confused.most_common(_SHOWN))
            console.line(f"old classes most often confused with the new ones: {worst or 'none'}")
