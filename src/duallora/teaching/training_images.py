"""The images of one lesson: what to learn from, and what is held back to measure on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from duallora.streams import (
    BadImagesError,
    FolderDataset,
    TaskDataset,
    evaluation_folder,
    hold_back,
    train_and_val,
)
from duallora.streams.copies import read_once, warn_of_copies
from duallora.streams.labels import refuse_two_labels
from duallora.streams.task import as_task_dataset

if TYPE_CHECKING:
    from duallora.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """Labelled images, all of them decoded once.

    Attributes:
        train: images to learn from.
        held_back: images to measure on, of the classes that have some; None where nothing is held back.
        bad_images: files left out because they are no readable images.
        seconds: how long it took to read all images once.
    """

    train: TaskDataset
    held_back: TaskDataset | None
    bad_images: tuple[Path, ...]
    seconds: float

    @classmethod
    def read(cls, folder: Path, progress: Progress, *, skip_bad_images: bool) -> TrainingImages:
        """Lists and decodes every image of a folder, so that none can stop the training.

        Args:
            folder: class folders, or ``train/`` and ``val/`` that hold them.
            progress: where to report.
            skip_bad_images: leave bad ones out instead of refusing the folder.

        Raises:
            DualLoRAError: the folder cannot be used; a bad image is named.
        """
        train_folder, val_folder = train_and_val(folder)
        with _remedy():
            train = FolderDataset(train_folder, skip_bad_images=skip_bad_images)
            val = None if val_folder is None else FolderDataset(val_folder, skip_bad_images=skip_bad_images)
            start = time.perf_counter()
            _check(train, progress)
            seconds = time.perf_counter() - start
            hash_of = read_once()
            refuse_two_labels([*train.labelled, *([] if val is None else val.labelled)], hash_of)
            if val is None:
                kept, held = hold_back(train)
                warn_of_copies(kept.files, [] if held is None else held.files, hash_of)
                return cls(kept, held and present(held), tuple(train.bad_images), seconds)
            _check(val, progress)
        warn_of_copies(train.paths, val.paths, hash_of)
        bad = (*train.bad_images, *val.bad_images)
        return cls(as_task_dataset(train), as_task_dataset(val), bad, seconds)


def labelled(folder: Path, progress: Progress, *, skip_bad_images: bool) -> FolderDataset:
    """Labelled images to measure on, all decoded once, from ``val/`` or ``test/`` where there is one.

    Args:
        folder: class folders, or ``val/`` or ``test/`` that hold them.
        progress: where to report.
        skip_bad_images: leave bad ones out instead of refusing the folder.

    Raises:
        DualLoRAError: the folder cannot be used; a bad image is named.
    """
    with _remedy():
        dataset = FolderDataset(evaluation_folder(folder), skip_bad_images=skip_bad_images)
        _check(dataset, progress)
    refuse_two_labels(dataset.labelled)
    return dataset


@contextmanager
def _remedy() -> Iterator[None]:
    """Adds to the refusal of a bad image what this command can do about it."""
    try:
        yield
    except BadImagesError as error:
        raise BadImagesError(f"{error}; --skip-bad-images leaves such files out") from error


def _check(dataset: FolderDataset, progress: Progress) -> None:
    dataset.check(lambda paths: progress.track(paths, len(paths), f"checking {dataset.folder}"))


def present(view: TaskDataset) -> TaskDataset:
    """The same view without the classes that have no image in it."""
    present = sorted(set(view.targets))
    view = view.subset(range(len(view)))
    view.classes = [view.classes[target] for target in present]
    view.targets = [present.index(target) for target in view.targets]
    return view
