"""Data sets with domains of their own: one task a domain, or all domains pooled."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.collection import Collection
from duallora.streams.split import (
    OrderSeed,
    check_images,
    check_known,
    check_numbers,
    class_order,
    divide,
    first_names,
    order_rule,
    select,
)
from duallora.streams.task import Stream, Task, TaskDataset, as_task_dataset, concatenated


def one_task_a_domain(
    collection: Collection,
    order_seed: OrderSeed,
    *,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
) -> Stream:
    """The same classes in one domain after another.

    A class without training images in a domain is not taught there. Its test images in that domain stay where
    an earlier domain taught it, and are left out otherwise, as nobody could know them.

    Args:
        collection: its parts are the domains, in order.
        order_seed: as for ``split``.
        classes: take the first so many of the sorted names, those of all domains together.
        train_per_class: take the first so many training images of each class in each domain.
        holdout: as for ``split``, for each class in each domain.

    Raises:
        DualLoRAError: as for ``split``.
    """
    check_numbers(classes, train_per_class, holdout)
    views = [as_task_dataset(part.train) for part in collection.parts]
    every = {name for view in views for name in view.classes}
    names = first_names(sorted(every), classes)
    order = class_order(names, order_seed, collection.group)
    taught: set[str] = set()
    tasks = []
    for part, view in zip(collection.parts, views, strict=True):
        present = {view.classes[target] for target in view.targets}
        own = [name for name in order if name in present]
        if not own:
            raise DualLoRAError(
                f"the domain {part.domain!r} has no image to train on: add some or leave it out"
            )
        training, test_view, testing = divide(
            view, None if holdout else part.test, own, train_per_class, holdout
        )
        check_known(sorted(every), test_view.classes)
        earlier = [name for name in order if name in taught and name not in present and testing.get(name)]
        task = Task(part.domain, select(view, training, own), select(test_view, testing, own + earlier))
        check_images([task], training)
        tasks.append(task)
        taught.update(own)
    return Stream(
        f"{collection.name} (domains)",
        tuple(tasks),
        tuple(order),
        order_seed,
        collection.augmentation,
        order_rule(names, order_seed, collection.group),
    )


def pooled(collection: Collection) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The images of all domains together: to train on and to test on, None where there are no such."""
    if len(collection.parts) == 1:
        return collection.parts[0].train, collection.parts[0].test
    train = [as_task_dataset(part.train) for part in collection.parts]
    test = [as_task_dataset(part.test) for part in collection.parts if part.test is not None]
    return _together(train), _together(test) if test else None


def _together(views: list[TaskDataset]) -> TaskDataset:
    return concatenated(views, sorted({name for view in views for name in view.classes}))
