"""What one ``duallora learn`` has led to: measured before the model is saved, told afterwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from duallora import metrics
from duallora.commands import console
from duallora.errors import CheckFailed
from duallora.report import percent

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import Evaluation, TaskRecord
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
class Outcome:
    """What a task has led to.

    Attributes:
        record: the task.
        held_back: evaluation on the held-back images; None where nothing was held back.
        confused: per old class, how many images were mistaken between it and new classes; None where there
            are no old or no new classes.
    """

    record: TaskRecord
    held_back: Evaluation | None
    confused: Counter[str] | None

    @classmethod
    def measure(
        cls,
        learner: ContinualLearner,
        record: TaskRecord,
        known: list[str],
        held_back: TaskDataset | None,
        check: FolderDataset | None,
    ) -> Outcome:
        """Evaluates a learner that has just learned a task.

        Args:
            learner: after the task.
            record: the task.
            known: the classes that it knew before.
            held_back: images of the task, which it has not seen.
            check: images of classes that it knew before.
        """
        new = set(record.classes).difference(known)
        confused: Counter[str] | None = None
        if known and new and not (held_back is None and check is None):
            confused = Counter()
            for data in (held_back, check):
                for true, found in [] if data is None else _answers(learner, data):
                    if (true in new) != (found in new):
                        confused[found if true in new else true] += 1
        return cls(record, None if held_back is None else learner.evaluate(held_back), confused)

    def tell(self) -> None:
        """Prints the figures."""
        if self.held_back is None:
            console.line("held-back accuracy: not measured, no class has ten images; give some in val/")
        else:
            share, error = percent(self.held_back.accuracy), self.held_back.calibration_error
            console.line(f"held-back accuracy: {share} % on {self.held_back.images} images")
            console.line(f"calibration error: {'-' if error is None else f'{error:.3f}'}")
        if self.confused is not None:
            worst = ", ".join(f"{name} ({count})" for name, count in self.confused.most_common(_SHOWN))
            console.line(f"old classes most often confused with the new ones: {worst or 'none'}")


def _answers(learner: ContinualLearner, data: TaskDataset | FolderDataset) -> list[tuple[str, str]]:
    """True and predicted class name of every image."""
    outputs = learner.outputs(data)
    best = metrics.class_probabilities(outputs, outputs.readout).argmax(dim=1).tolist()
    return [(data.classes[t], learner.classes[c]) for t, c in zip(data.targets, best, strict=True)]
