"""Data sets as the learner sees them: views with class names, local targets and identifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from duallora.errors import DualLoRAError
from duallora.streams.names import hint_at_case, normal

Picture = Image.Image | torch.Tensor
Change = Callable[[Picture], Picture]

_SHARE_HELD_BACK = 10


class TaskDataset(Dataset[tuple[Picture, int]]):
    """Some samples of a data set, with the classes of one task.

    Attributes:
        classes: names of the task's classes.
        targets: per sample, the index of its class in ``classes``.
        identifiers: per sample, the path within the folder it came from, or its index.
    """

    def __init__(
        self,
        base: Dataset[Any],
        indices: Sequence[int],
        *,
        classes: Sequence[str],
        targets: Sequence[int],
        identifiers: Sequence[str],
        change: Change | None = None,
    ) -> None:
        """Makes the view.

        Args:
            base: data set of (image, anything) samples; it is read when a sample is asked for, never here.
            indices: which samples of ``base``, one per sample of the view.
            classes: names of the task's classes.
            targets: index into ``classes`` per sample of the view.
            identifiers: name per sample of the view.
            change: applied to every image, for instance to show it in another domain.
        """
        self.classes = list(classes)
        self.targets = list(targets)
        self.identifiers = list(identifiers)
        self._base = base
        self._indices = list(indices)
        self._change = change

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        image = self._base[self._indices[index]][0]
        return (image if self._change is None else self._change(image)), self.targets[index]

    @property
    def files(self) -> list[Path | None]:
        """Per sample, the file it is read from; None where that is not known."""
        own = _files(self._base)
        return [None if own is None else own[i] for i in self._indices]

    @property
    def labelled(self) -> list[tuple[Path | None, str]]:
        """Per sample, its file and the name of its class."""
        return [(file, self.classes[t]) for file, t in zip(self.files, self.targets, strict=True)]

    def subset(self, positions: Sequence[int]) -> TaskDataset:
        """The same view of fewer samples, given by their positions in it."""
        return TaskDataset(
            self._base,
            [self._indices[i] for i in positions],
            classes=self.classes,
            targets=[self.targets[i] for i in positions],
            identifiers=[self.identifiers[i] for i in positions],
            change=self._change,
        )


def _files(base: Dataset[Any]) -> Sequence[Path | None] | None:
    if isinstance(base, TaskDataset):
        return base.files
    if isinstance(base, ConcatDataset):
        parts = [(part, _files(part)) for part in base.datasets]
        return [
            file for part, own in parts for file in ([None] * len(cast("Any", part)) if own is None else own)
        ]
    paths: Sequence[Path] | None = getattr(base, "paths", None)
    return paths


def of_classes(data: TaskDataset, classes: Sequence[str]) -> TaskDataset | None:
    """The samples whose class is among these, with targets in their order; None where there are none."""
    place = {name: i for i, name in enumerate(classes)}
    view = data.subset([i for i, target in enumerate(data.targets) if data.classes[target] in place])
    view.targets = [place[data.classes[target]] for target in view.targets]
    view.classes = list(classes)
    return view if view.targets else None


@dataclass(frozen=True)
class Task:
    """What is learned in one go, and the images it is tested on."""

    name: str
    train: TaskDataset
    test: TaskDataset


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        name: for reports.
        tasks: the tasks.
        class_order: all class names, in the order in which they appear.
        order_seed: seed of that order, or ``"alphabetical"``.
        augmentation: the policy that suits these images, where the user names none.
        order_rule: how ``class_order`` came about: generator and direction, in words.
    """

    name: str
    tasks: tuple[Task, ...]
    class_order: tuple[str, ...]
    order_seed: int | str
    augmentation: str = "crop,flip"
    order_rule: str = ""

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def all_at_once(stream: Stream) -> Stream:
    """The same images as a single task of all classes, for joint training."""
    if len(stream) == 1:
        return stream
    train, test = (
        concatenated([getattr(task, part) for task in stream], stream.class_order)
        for part in ("train", "test")
    )
    return replace(stream, tasks=(Task("all tasks", train, test),))


def concatenated(
    parts: Sequence[TaskDataset], classes: Sequence[str], change: Change | None = None
) -> TaskDataset:
    """The samples of several data sets one after another, their classes found by name in ``classes``."""
    position = {name: i for i, name in enumerate(classes)}
    targets = [position[part.classes[target]] for part in parts for target in part.targets]
    return TaskDataset(
        ConcatDataset(parts),
        range(len(targets)),
        classes=classes,
        targets=targets,
        identifiers=[identifier for part in parts for identifier in part.identifiers],
        change=change,
    )


def as_task_dataset(dataset: Dataset[Any]) -> TaskDataset:
    """Reads class names, targets and identifiers off any data set of (image, class index) samples.

    Args:
        dataset: map-style data set with a list ``classes`` of names. ``targets`` is used where there is
            one; otherwise every sample is read once. ``identifiers`` likewise, otherwise the index.

    Returns:
        A view of all samples; the data set itself if it is one already.

    Raises:
        DualLoRAError: there are no class names, a name cannot be used, or a target has no name.
    """
    if isinstance(dataset, TaskDataset):
        return dataset
    classes = getattr(dataset, "classes", None)
    if classes is None or isinstance(classes, str):
        raise DualLoRAError(
            f"the data set ({type(dataset).__name__}) has no class names: give it a list `classes` of them"
        )
    names = check_class_names(list(classes))
    size = len(cast("Sequence[Any]", dataset))
    targets = getattr(dataset, "targets", None)
    targets = [int(dataset[i][1]) for i in range(size)] if targets is None else [int(t) for t in targets]
    if len(targets) != size:
        raise DualLoRAError(f"the data set has {size} samples and {len(targets)} targets: one each is needed")
    if targets and not (min(targets) >= 0 and max(targets) < len(names)):
        wrong = next(t for t in targets if not 0 <= t < len(names))
        raise DualLoRAError(f"target {wrong} has no class name: the data set names {len(names)} classes")
    identifiers = getattr(dataset, "identifiers", None) or [str(i) for i in range(size)]
    return TaskDataset(dataset, range(size), classes=names, targets=targets, identifiers=identifiers)


def check_class_names(names: Sequence[object]) -> list[str]:
    """Returns the names as a list, in composed unicode, if each can be stored, shown and told apart.

    Any unicode text will do, slashes included: class names never become file names. Names that differ in
    upper and lower case alone get a warning.

    Raises:
        DualLoRAError: a name is no text, empty, not valid unicode, has a control character, or comes twice.
    """
    checked: list[str] = []
    for name in names:
        if not isinstance(name, str):
            raise DualLoRAError(f"a class name must be text, not {name!r}: use str() on the names")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DualLoRAError(f"the class name {name!a} is not valid unicode: rename the class")
        if not name.strip() or any(letter < " " or letter == "\x7f" for letter in name):
            raise DualLoRAError(
                f"the class name {name!r} is empty or has control characters: rename the class"
            )
        checked.append(normal(name))
    if len(set(checked)) < len(checked):
        twice = next(name for name in checked if checked.count(name) > 1)
        raise DualLoRAError(f"the class name {twice!r} comes twice: every class needs a name of its own")
    hint_at_case(checked)
    return checked


def positions_by_class(dataset: TaskDataset) -> list[list[int]]:
    """The positions of every class's samples, in the data set's order."""
    positions: list[list[int]] = [[] for _ in dataset.classes]
    for position, target in enumerate(dataset.targets):
        positions[target].append(position)
    return positions


def hold_back(dataset: Dataset[Any], every: int = _SHARE_HELD_BACK) -> tuple[TaskDataset, TaskDataset | None]:
    """Holds every tenth image of each class back, which leaves classes of fewer than ten untouched.

    Args:
        dataset: as for ``as_task_dataset``.
        every: another number in place of ten.

    Returns:
        The images to train on, and those held back (None when no class has so many).

    Raises:
        DualLoRAError: as for ``as_task_dataset``.
    """
    view = as_task_dataset(dataset)
    held = [i for p in positions_by_class(view) for i in p[every - 1 :: every]]
    if not held:
        return view, None
    kept = sorted(set(range(len(view))).difference(held))
    return view.subset(kept), view.subset(sorted(held))


def without_empty_classes(dataset: Dataset[Any]) -> tuple[TaskDataset, tuple[str, ...]]:
    """The data set as a view, and the names its targets refer to; every class has an image.

    Raises:
        DualLoRAError: if it is empty, or a class has no image.
    """
    data = as_task_dataset(dataset)
    if not len(data):
        raise DualLoRAError("the data set has no images; give at least one image of one class.")
    seen = set(data.targets)
    empty = [name for i, name in enumerate(data.classes) if i not in seen]
    if empty:
        raise DualLoRAError(f"class {empty[0]!r} has no images; add some or leave the class out.")
    return data, tuple(data.classes)
