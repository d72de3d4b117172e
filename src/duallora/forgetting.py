"""Taking back what was taught: classes and tasks leave a learner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from duallora.errors import DualLoRAError
from duallora.outputs import TaskRecord, free_name
from duallora.streams.names import normal

if TYPE_CHECKING:
    from duallora.methods import Method


@dataclass(frozen=True)
class Forgotten:
    """What a learner has forgotten.

    Attributes:
        classes: names that it does not know any more.
        tasks: names of the tasks that have gone as a whole.
        still_named: names of tasks that stay and have the name of a forgotten class in theirs.
    """

    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    still_named: tuple[str, ...] = ()


def forget(
    method: Method,
    tasks: list[TaskRecord],
    known: list[str],
    *,
    task: str | None = None,
    name: str | None = None,
) -> Forgotten:
    """Takes a task or a class back, in memory; a forgotten task keeps its index and neither class nor name.

    A class that several tasks taught is forgotten in all of them. A task of which no class is left is
    forgotten as a whole. The classes of a task that another task taught too are still known. A task that is
    named after its classes is renamed after those that are left; another name stays.

    Args:
        method: of the learner; changed in place.
        tasks: records of all tasks; changed in place.
        known: names of all classes; changed in place.
        task: name of a task.
        name: of a class; one of the two is given.

    Raises:
        DualLoRAError: there is none of that name, or it is all that the learner knows.
    """
    if name not in known:  # the same name, typed in another form of unicode
        name = next((c for c in known if name is not None and normal(c) == normal(name)), name)
    found = _positions(tasks, known, task, name)
    records = list(tasks)
    left = {t: [c for c in records[t].classes if task is None and c != name] for t in found}
    if not any(left.get(t, record.classes) for t, record in enumerate(records)):
        raise DualLoRAError("this is all that the model knows; delete its folder instead.")
    gone = []
    for t, classes in left.items():
        record = records[t]
        kept = torch.tensor([c in classes for c in record.classes])
        count = method.rows.moments.count[method.rows.task == t]
        method.forget(t, kept)
        if classes:
            images = record.train_images - int(count[~kept].sum())
            renamed = _renamed(record, classes, {each.name for each in records})
            records[t] = replace(record, name=renamed, classes=tuple(classes), train_images=images)
        else:
            gone.append(record.name)
            records[t] = _without_a_trace(record, t, {each.name for each in records})
    still_known = {c for record in records for c in record.classes}
    lost = tuple(c for c in known if c not in still_known)
    tasks[:] = records
    known[:] = [c for c in known if c in still_known]
    still = [r.name for r in records if r.classes and any(_within(c, r.name) for c in lost)]
    return Forgotten(lost, tuple(gone), tuple(still))


def _positions(
    tasks: Sequence[TaskRecord], known: Sequence[str], task: str | None, name: str | None
) -> Sequence[int]:
    """Indices of the tasks that are concerned."""
    names: Sequence[str]
    if task is not None:
        found = [t for t, record in enumerate(tasks) if record.name == task and record.classes]
        names, kind, asked = [record.name for record in tasks if record.classes], "task", task
    else:
        found = [t for t, record in enumerate(tasks) if name in record.classes]
        names, kind, asked = known, "class", str(name)
    if found:
        return found
    shown = ", ".join(map(repr, names[:10])) + (" ..." if len(names) > 10 else "")
    raise DualLoRAError(f"the model has learned no {kind} named {asked!r}; it knows {shown or 'nothing'}.")


def _renamed(record: TaskRecord, classes: Sequence[str], taken: set[str]) -> str:
    """The name of a task once ``classes`` are left: another one if it was made of its classes."""
    old, base = ", ".join(record.classes), ", ".join(classes)
    # A number tells tasks of equal classes apart.
    if not re.fullmatch(re.escape(old) + r"( \d+)?", record.name):
        return record.name
    return free_name(base, taken)


def _within(name: str, text: str) -> bool:
    """Whether a name is in a text, as words of their own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _without_a_trace(record: TaskRecord, index: int, taken: set[str]) -> TaskRecord:
    """The record of a forgotten task: its place in the order, and when it was learned."""
    name = f"(forgotten {index + 1})"
    while name in taken:
        name = f"({name})"
    return TaskRecord(name, (), record.learned_at, 0, 0.0, 0.0, 0.0, 0, record.stored_bytes, None, None)
