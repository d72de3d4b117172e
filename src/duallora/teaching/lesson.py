"""One lesson: a saved model is opened under its lock, taught, measured and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duallora.errors import DualLoRAError
from duallora.outputs import free_name
from duallora.storage import checkpoint
from duallora.teaching.measure import Comparison, Measured

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import TaskRecord
    from duallora.runtime.progress import Progress
    from duallora.streams import FolderDataset
    from duallora.teaching.model_request import ModelRequest
    from duallora.teaching.training_images import TrainingImages


@dataclass(frozen=True)
class Learned:
    """What came of a lesson.

    Attributes:
        learner: after it.
        record: of the task.
        known: classes that the learner knew before.
        comparison: accuracy on the check images before and after; None without such images.
        check: on the check images afterwards; None without such images.
        held_back: on the images held back; None where nothing was held back.
        train: on the images learned from; None where it was not asked for, or no older class is left that
            they could be taken for.
    """

    learner: ContinualLearner
    record: TaskRecord
    known: tuple[str, ...]
    comparison: Comparison | None
    check: Measured | None
    held_back: Measured | None
    train: Measured | None

    @property
    def old(self) -> set[str]:
        """Classes known before that this lesson did not teach again."""
        return set(self.known).difference(self.record.classes)


@dataclass(frozen=True)
class Lesson:
    """What a saved model is taught, and what it is measured on.

    Attributes:
        model: folder of the saved model; made by its first lesson.
        request: what is asked of the model.
        images: to learn from, and held back to measure on.
        name: of the task; None takes ``base``, with a number where the model has learned a task of that name.
        base: for a task without a name of its own.
        check: images of classes that the model knows; None for none.
        max_drop: a larger drop of the accuracy on them leaves the model as it was.
        measure_train: also measure on the images learned from, where they might be taken for an older class.
    """

    model: Path
    request: ModelRequest
    images: TrainingImages
    name: str | None = None
    base: str = "task"
    check: FolderDataset | None = None
    max_drop: float = 1.0
    measure_train: bool = False

    def open(self, progress: Progress) -> ContinualLearner:
        """The learner that is to be taught, which knows or will know the classes to measure on.

        Raises:
            DualLoRAError: The model cannot be used as asked, or does not know a class of the images to
                measure on.
        """
        learner = self.request.open(self.model, progress)
        asked = [] if self.check is None else self.check.classes
        unknown = [name for name in asked if name not in learner.classes]
        if unknown:
            raise DualLoRAError(
                f"the --check images have a class {unknown[0]} that the model has not learned; give images "
                "of classes that it knows."
            )
        known = {*self.images.train.classes, *learner.classes}
        held_back = [] if self.images.held_back is None else self.images.held_back.classes
        unknown = [name for name in held_back if name not in known]
        if unknown:
            raise DualLoRAError(
                f"val/ has a class {unknown[0]} that train/ has not; give both the same classes."
            )
        return learner

    def name_for(self, learner: ContinualLearner) -> str:
        """The name that the task gets."""
        return self.name or free_name(self.base, {task.name for task in learner.tasks})

    @contextmanager
    def taught(self, progress: Progress) -> Iterator[Learned]:
        """Inside, the model has learned and is measured; it is saved at the end, unless the body fails.

        Raises:
            CheckFailed: The accuracy on the check images dropped too far; the model is as it was.
            DualLoRAError: The model cannot be used as asked, or is in use; the model is as it was.
        """
        with checkpoint.exclusive(self.model):
            learner = self.open(progress)
            known = tuple(learner.classes)
            before = Measured.on(learner, self.check)
            with self.request.granted(learner):
                name, aside = self.name_for(learner), self.images.held_back
                record = learner.learn(self.images.train, name, held_back=aside)
            after, comparison = Measured.on(learner, self.check), None
            if before is not None and after is not None:
                comparison = Comparison(before.accuracy, after.accuracy)
                comparison.require(self.max_drop)
            progress.begin("measuring on the images held back")
            held_back = Measured.on(learner, aside)
            if held_back is not None:
                record = held_back.note(learner)
            train = None
            if self.measure_train and set(known).difference(record.classes):
                progress.begin("looking for new images that are taken for old classes")
                train = Measured.on(learner, self.images.train)
            progress.record(_figures(record, len(learner.tasks), comparison))
            yield Learned(learner, record, known, comparison, after, held_back, train)
            progress.begin("saving")
            learner.commit(self.model)


def _figures(record: TaskRecord, number: int, comparison: Comparison | None) -> dict[str, float]:
    """What of a lesson a logger shows, by name."""
    found = record.figures(number)
    if record.held_back_accuracy is not None:
        found["accuracy/held back"] = record.held_back_accuracy
    if comparison is not None:
        found |= {"accuracy/check before": comparison.before, "accuracy/check after": comparison.after}
    return found
