"""What a learner says of labelled images, before and after it is taught something or forgets it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch

from duallora.errors import CheckFailed
from duallora.predictions import best, calibration_error, class_probabilities
from duallora.storage.documents import percent
from duallora.teaching.unknown import unknown_below

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import TaskRecord
    from duallora.streams import FolderDataset, TaskDataset


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


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a learner says of labelled images, in one pass over them.

    Attributes:
        accuracy: share of images whose class is right.
        calibration_error: expected calibration error; None where it is undefined.
        answers: true and predicted class name of every image.
        confidence: probability of the predicted class of every image.
        familiarity: of every image, in [0, 1].
    """

    accuracy: float
    calibration_error: float | None
    answers: tuple[tuple[str, str], ...]
    confidence: tuple[float, ...]
    familiarity: tuple[float, ...]

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
        familiarity = tuple(outputs.familiarity.tolist())
        accuracy = int(right.sum()) / len(right)
        return cls(accuracy, error, tuple(names), tuple(confidence.tolist()), familiarity)

    def note(self, learner: ContinualLearner) -> TaskRecord:
        """Puts what held-back images say into the record of the latest task, to be saved with it."""
        record = dataclasses.replace(
            learner.tasks[-1],
            held_back_accuracy=self.accuracy,
            held_back_images=len(self.answers),
            unknown_below=unknown_below(self.familiarity),
        )
        learner.tasks[-1] = record
        return record


def confused(
    known: Collection[str], taught: Collection[str], measured: Iterable[Measured | None]
) -> Counter[str] | None:
    """Per old class, how many images were mistaken between it and new classes.

    Args:
        known: the classes that the learner knew before a task.
        taught: the classes of the task.
        measured: after it; None where there were no images.

    Returns:
        The counts; None where there are no old classes, no new ones, or no images.
    """
    new = set(taught).difference(known)
    there = [each for each in measured if each is not None]
    if not (known and new and there):
        return None
    counts: Counter[str] = Counter()
    for true, found in (names for each in there for names in each.answers):
        if (true in new) != (found in new):
            counts[found if true in new else true] += 1
    return counts
