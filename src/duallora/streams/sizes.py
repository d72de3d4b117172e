"""How many classes each task has."""

from __future__ import annotations

from collections.abc import Sequence

from duallora.errors import DualLoRAError

Sizes = int | Sequence[int]
"""A number of tasks, or the number of classes of each."""


def task_sizes(classes: int, tasks: Sizes, first_classes: int | None = None) -> list[int]:
    """Divides classes among tasks.

    Args:
        classes: how many there are.
        tasks: number of tasks, which get (nearly) equally many: when it does not divide the classes, the
            first tasks get one more. Or the number of classes of each task.
        first_classes: the first task has so many, and the others share the rest equally.

    Returns:
        The number of classes of each task.

    Raises:
        DualLoRAError: a task would have no class, or the sizes do not add up.
    """
    if not isinstance(tasks, int):
        return _given(classes, list(tasks), first_classes)
    if tasks < 1:
        raise DualLoRAError(f"tasks must be at least 1, not {tasks}")
    if first_classes is None:
        if tasks > classes:
            raise DualLoRAError(
                f"{tasks} tasks need at least {tasks} classes, not {classes}: ask for fewer tasks"
            )
        return _equal(classes, tasks)
    if first_classes < 1:
        raise DualLoRAError(f"first_classes must be at least 1, not {first_classes}")
    if tasks < 2:
        raise DualLoRAError("first_classes sets the first task apart from others: ask for at least 2 tasks")
    rest = classes - first_classes
    if rest < tasks - 1:
        raise DualLoRAError(
            f"a first task of {first_classes} of {classes} classes leaves {max(rest, 0)} for {tasks - 1} "
            "more: ask for a smaller one or for fewer tasks"
        )
    return [first_classes, *_equal(rest, tasks - 1)]


def _equal(classes: int, tasks: int) -> list[int]:
    each, more = divmod(classes, tasks)
    return [each + 1] * more + [each] * (tasks - more)


def _given(classes: int, sizes: list[int], first_classes: int | None) -> list[int]:
    shown = ", ".join(map(str, sizes))
    if first_classes is not None:
        raise DualLoRAError("the size of every task is given, the first one's too: leave first_classes out")
    if not sizes or min(sizes) < 1:
        raise DualLoRAError(f"every task needs at least 1 class, and the sizes are {shown or 'none'}")
    if sum(sizes) != classes:
        raise DualLoRAError(
            f"the tasks have {shown} classes, {sum(sizes)} together, and there are {classes}: "
            "change a size or take fewer classes"
        )
    return sizes
