"""Splitting a data set into tasks of a few classes each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.sizes import Sizes, task_sizes
from duallora.streams.task import Stream, Task, TaskDataset, as_task_dataset, positions_by_class

_TEST_SHARE = 5

Positions = dict[str, list[int]]
"""Positions of the samples of every class, by class name."""

OrderSeed = int | Literal["alphabetical"]
Group = Callable[[str], str]
"""The group that a class belongs to, by their names."""


def split(
    dataset: Dataset[Any],
    tasks: Sizes = 10,
    *,
    test: Dataset[Any] | None = None,
    order_seed: OrderSeed = 1993,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    name: str = "split",
    first_classes: int | None = None,
    group: Group | None = None,
) -> Stream:
    """Splits a data set into tasks of some classes each.

    Args:
        dataset: training images: any map-style data set of (PIL image or tensor, class index) with a list
            ``classes``. With neither ``test`` nor ``holdout``, every fifth image of a class is a test image.
        tasks: number of tasks; when it does not divide the classes, the first tasks get one more. Or the
            number of classes of each task.
        test: test images, whose classes are matched by name.
        order_seed: the class order is ``numpy.random.RandomState(order_seed).permutation(C)``: position i
            is class ``order[i]`` of the sorted names; ``"alphabetical"`` keeps them sorted.
        classes: take the first so many of the sorted names only.
        train_per_class: take the first so many training images of each class only.
        holdout: test on so many training images of each class: those that follow the first
            ``train_per_class``, or the last ones where that is not given.
        name: name of the stream.
        first_classes: the first task has so many classes, and the others share the rest equally.
        group: the groups of classes come one after another, by name, and the order is taken within each.

    Returns:
        The stream of tasks ``task 1``, ``task 2``, ...

    Raises:
        DualLoRAError: a number is out of range, a class has no image to train on, a task none to test on,
            or the data sets do not fit together.
    """
    check_numbers(classes, train_per_class, holdout)
    train_view = as_task_dataset(dataset)
    names = first_names(train_view.classes, classes)
    sizes = task_sizes(len(names), tasks, first_classes)
    order = class_order(names, order_seed, group)
    training, test_view, testing = divide(train_view, test, names, train_per_class, holdout)
    if test is not None:
        check_known(train_view.classes, test_view.classes)
    made = []
    for number, end in enumerate(np.cumsum(sizes).tolist(), start=1):
        own = order[end - sizes[number - 1] : end]
        made.append(
            Task(f"task {number}", select(train_view, training, own), select(test_view, testing, own))
        )
    check_images(made, training)
    return Stream(
        name, tuple(made), tuple(order), order_seed, order_rule=order_rule(names, order_seed, group)
    )


def check_numbers(classes: int | None, train_per_class: int | None, holdout: int) -> None:
    """Refuses numbers out of range.

    Raises:
        DualLoRAError: naming the number.
    """
    for what, number in {"classes": classes, "train_per_class": train_per_class}.items():
        if number is not None and number < 1:
            raise DualLoRAError(f"{what} must be at least 1, not {number}")
    if holdout < 0:
        raise DualLoRAError(f"holdout must be 0 or more images a class, not {holdout}")


def first_names(classes: Sequence[str], number: int | None) -> list[str]:
    """The first so many of the sorted names; None takes all.

    Raises:
        DualLoRAError: there are fewer.
    """
    if number is not None and number > len(classes):
        raise DualLoRAError(f"{number} classes were asked for and the data set has {len(classes)}")
    return sorted(classes)[:number]


def class_order(names: Sequence[str], order_seed: int | str, group: Group | None = None) -> list[str]:
    """The sorted names in the order in which they are learned; see ``order_rule``.

    Raises:
        DualLoRAError: the seed is not one.
    """
    if order_seed != "alphabetical" and (not isinstance(order_seed, int) or not 0 <= order_seed < 2**32):
        raise DualLoRAError(
            f'the order must be "alphabetical" or a number from 0 to 2**32 - 1, not {order_seed!r}'
        )
    order: list[str] = []
    for own in _groups(names, group).values():
        chosen = (
            range(len(own))
            if order_seed == "alphabetical"
            else np.random.RandomState(int(order_seed)).permutation(len(own)).tolist()
        )
        order += [own[i] for i in chosen]
    return order


def order_rule(names: Sequence[str], order_seed: int | str, group: Group | None = None) -> str:
    """Generator and direction of ``class_order`` in words."""
    groups = _groups(names, group)
    where = "" if len(groups) < 2 else f" within each of {len(groups)} groups of classes, one after another"
    if order_seed == "alphabetical":
        return f"the sorted class names{where}"
    sizes = sorted({len(own) for own in groups.values()}, reverse=True)
    return (
        f"numpy.random.RandomState({order_seed}).permutation({' or '.join(map(str, sizes))}): position i is "
        f"class order[i] of the sorted class names{where}"
    )


def divide(
    train: TaskDataset,
    test: Dataset[Any] | None,
    names: Sequence[str],
    train_per_class: int | None,
    holdout: int,
) -> tuple[Positions, TaskDataset, Positions]:
    """Which images of each class to train and to test on.

    Returns:
        Positions in ``train``, the view to test on, and positions in it.

    Raises:
        DualLoRAError: there are a test set and ``holdout``, or a class has too few images to hold back.
    """
    training = _positions(train)
    if test is None:
        training, testing = _separate(training, names, train_per_class, holdout)
        test_view = train
    elif holdout:
        raise DualLoRAError("holdout takes the test images from the training images: leave out the test set")
    else:
        test_view = as_task_dataset(test)
        testing = _positions(test_view)
    return {n: training[n][:train_per_class] for n in names}, test_view, testing


def _groups(names: Sequence[str], group: Group | None) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault("" if group is None else group(name), []).append(name)
    return {key: members[key] for key in sorted(members)}


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


def check_known(train: Sequence[str], test: Sequence[str]) -> None:
    """Refuses classes to test on that are never taught.

    Raises:
        DualLoRAError: naming the first.
    """
    unknown = sorted(set(test).difference(train))
    if unknown:
        raise DualLoRAError(
            f"the test set has {len(unknown)} classes that the training set has not, the first is "
            f"{unknown[0]!r}: give both the same class names"
        )


def check_images(tasks: Sequence[Task], training: Positions) -> None:
    """Refuses classes without images to train on, and tasks without images to test on.

    Raises:
        DualLoRAError: naming the first.
    """
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


def select(view: TaskDataset, positions: Positions, classes: Sequence[str]) -> TaskDataset:
    """The samples of these classes in the view's order, with targets local to them."""
    local = {p: target for target, name in enumerate(classes) for p in positions.get(name, [])}
    chosen = view.subset(sorted(local))
    chosen.classes = list(classes)
    chosen.targets = [local[p] for p in sorted(local)]
    return chosen
