"""Taking back what was taught: classes and tasks leave a learner, and what is left of them is measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.outputs import TaskRecord
from duallora.streams import TaskDataset
from duallora.training import EVALUATION_BATCH, batches, chunked

if TYPE_CHECKING:
    from duallora.classifiers.class_statistics import RowMemory
    from duallora.learner import ContinualLearner


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


def forget(learner: ContinualLearner, *, task: str | None = None, name: str | None = None) -> Forgotten:
    """Takes a task or a class back, in memory; a forgotten task keeps its index and neither class nor name.

    A class that several tasks taught is forgotten in all of them. A task of which no class is left is
    forgotten as a whole. The classes of a task that another task taught too are still known. A task that is
    named after its classes is renamed after those that are left; another name stays.

    Args:
        learner: changed in place.
        task: name of a task.
        name: of a class; one of the two is given.

    Raises:
        DualLoRAError: there is none of that name, or it is all that the learner knows.
    """
    found = _positions(learner, task, name)
    records = list(learner.tasks)
    left = {t: [c for c in records[t].classes if task is None and c != name] for t in found}
    if not any(left.get(t, record.classes) for t, record in enumerate(records)):
        raise DualLoRAError("this is all that the model knows; delete its folder instead.")
    gone = []
    for t, classes in left.items():
        record = records[t]
        kept = torch.tensor([c in classes for c in record.classes])
        count = learner.method.rows.moments.count[learner.method.rows.task == t]
        learner.method.forget(t, kept)
        if classes:
            images = record.train_images - int(count[~kept].sum())
            renamed = _renamed(record, classes, {each.name for each in records})
            records[t] = replace(record, name=renamed, classes=tuple(classes), train_images=images)
        else:
            gone.append(record.name)
            records[t] = _without_a_trace(record, t, {each.name for each in records})
    known = {c for record in records for c in record.classes}
    lost = tuple(c for c in learner.classes if c not in known)
    learner.tasks[:] = records
    learner.classes[:] = [c for c in learner.classes if c in known]
    still = [r.name for r in records if r.classes and any(_within(c, r.name) for c in lost)]
    return Forgotten(lost, tuple(gone), tuple(still))


def relearned(learner: ContinualLearner, data: TaskDataset) -> Tensor:
    """How well classes that a learner does not know could be taught again, from its weights as they are.

    All of them become class rows beside the known ones, under the covariance that is there; every image is
    left out of the mean of its own class when it is answered.

    Args:
        learner: whose features and rows are used; nothing about it changes.
        data: images of classes that it does not know, two or more of each.

    Returns:
        The share of images of every class of ``data`` that are recognised (C,), fp64.
    """
    chunks = chunked(range(len(data)), EVALUATION_BATCH)
    view = partial(_evaluation_view, learner)
    features, labels = learner.method.observe(partial(batches, data, view, learner.machine, chunks))
    return _recognised(learner.method.rows, features, labels, len(data.classes))


def _evaluation_view(learner: ContinualLearner, image: object, _: int) -> Tensor:
    return learner.preprocess(image)


@torch.no_grad()
def _recognised(rows: RowMemory, features: Tensor, labels: Tensor, classes: int) -> Tensor:
    z, own = rows.whitened(features).cpu().double(), labels.cpu()
    count = torch.bincount(own, minlength=classes).double()
    mean = torch.zeros(classes, z.shape[1], dtype=z.dtype).index_add_(0, own, z) / count[:, None]
    share = rows.shares(count)  # as rows of so many images beside the known ones
    scores = share * (z @ mean.T) - share.square() * mean.square().sum(1) / 2
    n = count[own][:, None]
    without = (n * mean[own] - z) / (n - 1)  # the mean of the other images of the class
    without = rows.shares(count - 1)[own][:, None] * without
    alone = (z * without).sum(1) - without.square().sum(1) / 2
    scores = scores.scatter(1, own[:, None], alone[:, None])
    known = rows.scores(features).cpu().double()
    right = torch.cat([scores, known], 1).argmax(1) == own
    return torch.bincount(own[right], minlength=classes).double() / count


def _positions(learner: ContinualLearner, task: str | None, name: str | None) -> Sequence[int]:
    """Indices of the tasks that are concerned."""
    if task is not None:
        found = [t for t, record in enumerate(learner.tasks) if record.name == task and record.classes]
        names, kind, asked = [record.name for record in learner.tasks if record.classes], "task", task
    else:
        found = [t for t, record in enumerate(learner.tasks) if name in record.classes]
        names, kind, asked = learner.classes, "class", str(name)
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
    names = (base, *(f"{base} {number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _within(name: str, text: str) -> bool:
    """Whether a name is in a text, as words of their own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _without_a_trace(record: TaskRecord, index: int, taken: set[str]) -> TaskRecord:
    """The record of a forgotten task: its place in the order, and when it was learned."""
    name = f"(forgotten {index + 1})"
    while name in taken:
        name = f"({name})"
    return TaskRecord(name, (), record.learned_at, 0, 0.0, 0.0, 0.0, 0, record.stored_bytes, None, None)
