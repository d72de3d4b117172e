"""Splitting a data set into tasks of a few classes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.task import Stream, Task, TaskDataset, as_task_dataset, positions_by_class

_TEST_SHARE = 5

Positions = dict[str, list[int]]
"""Positions of the samples of every class, by class name."""


def split(
    dataset: Dataset[Any],
    tasks: int = 10,
    *,
    test: Dataset[Any] | None = None,
    order_seed: int | Literal["alphabetical"] = 1993,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    name: str = "split",
) -> Stream:
    """Splits a data set into tasks of (nearly) equal numbers of classes.

    Args:
        dataset: training images: any map-style data set of (PIL image or tensor, class index) with a list
            ``classes``. With neither ``test`` nor ``holdout``, every fifth image of a class is a test image.
        tasks: number of tasks; when it does not divide the classes, the first tasks get one more.
        test: test images, whose classes are matched by name.
        order_seed: the class order is ``numpy.random.RandomState(order_seed).permutation(C)``: position i
            is class ``order[i]`` of the sorted names; ``"alphabetical"`` keeps them sorted.
        classes: take the first so many of the sorted names only.
        train_per_class: take the first so many training images of each class only.
        holdout: test on so many training images of each class: those that follow the first
            ``train_per_class``, or the last ones where that is not given.
        name: name of the stream.

    Returns:
        The stream of tasks ``task 1``, ``task 2``, ...

    Raises:
        DualLoRAError: a number is out of range, a class has no image to train on, a task none to test on,
            or the data sets do not fit together.
    """
    _check_numbers(tasks, classes, train_per_class, holdout)
    if test is not None and holdout:
        raise DualLoRAError("holdout takes the test images from the training images: leave out the test set")
    train_view = as_task_dataset(dataset)
    names = _first_names(train_view.classes, classes, tasks)
    order = [names[i] for i in _order(len(names), order_seed)]
    training = _positions(train_view)
    if test is None:
        test_view = train_view
        training, testing = _separate(training, names, train_per_class, holdout)
    else:
        test_view = as_task_dataset(test)
        _check_same_classes(train_view.classes, test_view.classes)
        testing = _positions(test_view)
    training = {n: training[n][:train_per_class] for n in names}
    made = []
    for number, part in enumerate(np.array_split(np.arange(len(order)), tasks), start=1):
        own = [order[i] for i in part]
        made.append(
            Task(f"task {number}", _select(train_view, training, own), _select(test_view, testing, own))
        )
    _check_images(made, training)
    return Stream(name, tuple(made), tuple(order), order_seed)


def _check_numbers(tasks: int, classes: int | None, train_per_class: int | None, holdout: int) -> None:
    given = {"tasks": tasks, "classes": classes, "train_per_class": train_per_class}
    for what, number in given.items():
        if number is not None and number < 1:
            raise DualLoRAError(f"{what} must be at least 1, not {number}")
    if holdout < 0:
        raise DualLoRAError(f"holdout must be 0 or more images a class, not {holdout}")


def _first_names(classes: Sequence[str], number: int | None, tasks: int) -> list[str]:
    if number is not None and number > len(classes):
        raise DualLoRAError(f"{number} classes were asked for and the data set has {len(classes)}")
    names = sorted(classes)[:number]
    if tasks > len(names):
        raise DualLoRAError(
            f"{tasks} tasks need at least {tasks} classes, not {len(names)}: ask for fewer tasks"
        )
    return names


def _order(size: int, order_seed: int | str) -> list[int]:
    if order_seed == "alphabetical":
        return list(range(size))
    if not isinstance(order_seed, int) or not 0 <= order_seed < 2**32:
        raise DualLoRAError(
            f'the order must be "alphabetical" or a number from 0 to 2**32 - 1, not {order_seed!r}'
        )
    return [int(i) for i in np.random.RandomState(order_seed).permutation(size)]


def _positions(view: TaskDataset) -> Positions:
    return dict(zip(view.classes, positions_by_class(view), strict=True))


def _separate(
    images: Positions, names: Sequence[str], train_per_class: int | None, holdout: int
) -> tuple[Positions, Positions]:
    """Divides training images into those to train on and those to test on."""
    training, testing = {}, {}
    for name in names:
        own = images[name]
        if not holdout:
            testing[name] = own[_TEST_SHARE - 1 :: _TEST_SHARE]
            training[name] = [p for i, p in enumerate(own) if i % _TEST_SHARE != _TEST_SHARE - 1]
            continue
        start = max(0, len(own) - holdout) if train_per_class is None else train_per_class
        training[name], testing[name] = own[:start], own[start : start + holdout]
        if not testing[name]:
            raise DualLoRAError(
                f"the class {name!r} has {len(own)} training images, too few to hold {holdout} back "
                f"after the first {start}: lower the number of training images a class"
            )
    return training, testing


def _check_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    unknown = sorted(set(test).difference(train))
    if unknown:
        raise DualLoRAError(
            f"the test set has {len(unknown)} classes that the training set has not, the first is "
            f"{unknown[0]!r}: give both the same class names"
        )


def _check_images(tasks: Sequence[Task], training: Positions) -> None:
    for name, positions in training.items():
        if not positions:
            raise DualLoRAError(
                f"the class {name!r} has no image to train on: add some or leave the class out"
            )
    for task in tasks:
        if not len(task.test):
            raise DualLoRAError(
                f"{task.name} ({', '.join(task.train.classes)}) has no image to test on: "
                "add images or a test set"
            )


def _select(view: TaskDataset, positions: Positions, classes: Sequence[str]) -> TaskDataset:
    """The samples of these classes in the view's order, with targets local to them."""
    local = {p: target for target, name in enumerate(classes) for p in positions.get(name, [])}
    chosen = view.subset(sorted(local))
    chosen.classes = list(classes)
    chosen.targets = [local[p] for p in sorted(local)]
    return chosen
