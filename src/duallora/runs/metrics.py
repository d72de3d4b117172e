"""Figures of a learner on a stream of tasks, from integer hits.

Everything here is a pure function. A test image counts as a hit or not; hits of a task are integers, and a
fraction is formed once, at the end. Tasks are integers from 0 on, in the order in which they were learned,
and are never keyed or sorted as strings.

Conventions: ``n`` images, ``R`` rows, a row being a (task, class) pair, ``C`` classes seen so far, ``T``
tasks. ``rows[t][i]`` are the hits on the test images of task ``i`` after task ``t`` was learned, ``i <= t``;
None where they were not looked at, which is never so for ``i = t`` and in the last row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duallora.outputs import Outputs
from duallora.predictions import class_probabilities, log_rows

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Hits:
    """Right answers among the test images of one task, under one readout.

    Attributes:
        images: Number of test images.
        label: The class of largest probability among all seen classes is the right one.
        given_task: The same with the probabilities restricted to the rows of the true task.
        row: The row of largest probability is that of the right class in the right task.
        task: The row of largest probability belongs to the right task. `predict` names the task of largest
            summed probability instead, which may be another one.
    """

    images: int
    label: int
    given_task: int
    row: int
    task: int


Partial = Sequence[Hits | None]
"""Hits after one task on the test images of every task so far."""


def count_hits(outputs: Outputs, readout: str, labels: Tensor, task: int) -> Hits:
    """Counts the right answers on test images that all belong to one task.

    Args:
        outputs: What the learner says about the images.
        readout: ``"heads"`` or ``"calibrated"``.
        labels: (n,) true class indices, as in ``outputs.row_class``.
        task: The true task.
    """
    scores = log_rows(outputs, readout)
    own = (outputs.row_task == task).nonzero().squeeze(1)
    best = scores.argmax(dim=1)
    right_task = outputs.row_task[best] == task
    by_class = class_probabilities(outputs, readout).argmax(dim=1)  # among equals the first, as in `best`
    given_task = outputs.row_class[own[scores[:, own].argmax(dim=1)]]
    return Hits(
        images=len(labels),
        label=int((by_class == labels).sum()),
        given_task=int((given_task == labels).sum()),
        row=int((right_task & (outputs.row_class[best] == labels)).sum()),
        task=int(right_task.sum()),
    )


def feature_drift(now: Tensor, then: Tensor) -> float:
    """Relative change of features: mean over images of ``|now - then| / |then|``; both (n, d), same order."""
    if now.shape != then.shape:
        raise ValueError(f"features of different shapes: {tuple(now.shape)} and {tuple(then.shape)}")
    reference = then.double()
    norms = reference.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((now.double() - reference).norm(dim=1) / norms).mean())


def accuracy_matrix(rows: Sequence[Partial], kind: str = "label") -> Matrix:
    """T x T matrix, row = after task t, column = task i; None where task i was not yet seen or not looked at.

    Args:
        rows: ``rows[t]`` holds t + 1 entries.
        kind: Field of `Hits` that counts as right.

    Raises:
        ValueError: If the rows are not a triangle, a task's number of images changes, or a task has none.
    """
    _check(rows)
    tasks = len(rows)
    shares = [[None if hits is None else _share(hits, kind) for hits in row] for row in rows]
    return [row + [None] * (tasks - len(row)) for row in shares]


def accuracy(row: Partial, kind: str = "label") -> float:
    """Hits over images, all tasks of a row together: every image counts the same."""
    whole = _whole(row)
    return sum(_count(hits, kind) for hits in whole) / sum(hits.images for hits in whole)


def task_mean_accuracy(row: Partial, kind: str = "label") -> float:
    """Mean over tasks of the accuracy of each: every task counts the same."""
    return sum(_share(hits, kind) for hits in _whole(row)) / len(row)


def incremental_accuracy(rows: Sequence[Partial], kind: str = "label") -> list[float | None]:
    """Accuracy over all test images seen so far, after every task: T values, None where not all were."""
    return [None if None in row else accuracy(row, kind) for row in rows]


def forgetting(rows: Sequence[Partial], kind: str = "label") -> float:
    """Mean over earlier tasks of (best accuracy after any task) - (final accuracy); 0 with a single task."""
    _check(rows)
    final = _whole(rows[-1])
    drops = []
    for i, end in enumerate(final[:-1]):
        known = [hits for row in rows[i:] if (hits := row[i]) is not None]
        drops.append((max(_count(hits, kind) for hits in known) - _count(end, kind)) / end.images)
    return sum(drops) / len(drops) if drops else 0.0


def backward_transfer(rows: Sequence[Partial], kind: str = "label") -> float:
    """Mean over earlier tasks of (final accuracy) - (accuracy right after the task); 0 with a single task."""
    _check(rows)
    own = _whole([row[-1] for row in rows])
    pairs = list(zip(own, _whole(rows[-1]), strict=True))[:-1]
    gains = [(_count(end, kind) - _count(then, kind)) / end.images for then, end in pairs]
    return sum(gains) / len(gains) if gains else 0.0


def summary(rows: Sequence[Partial], error: float | None) -> dict[str, Any]:
    """All figures of one readout, named as in ``results.json``.

    Args:
        rows: Hits after every task.
        error: The calibration error over all test images after the last task.
    """
    curve = incremental_accuracy(rows)
    known = [share for share in curve if share is not None]
    return {
        "accuracy_matrix": accuracy_matrix(rows),
        "oracle_accuracy_matrix": accuracy_matrix(rows, "given_task"),
        "incremental_accuracy": curve,
        "final_accuracy": accuracy(rows[-1]),
        "final_row_accuracy": accuracy(rows[-1], "row"),
        "final_accuracy_task_mean": task_mean_accuracy(rows[-1]),
        "average_incremental_accuracy": sum(known) / len(known),
        "forgetting": forgetting(rows),
        "forgetting_given_task": forgetting(rows, "given_task"),
        "backward_transfer": backward_transfer(rows),
        "task_identity_accuracy": accuracy(rows[-1], "task"),
        "calibration_error": error,
    }


def _count(hits: Hits, kind: str) -> int:
    return int(getattr(hits, kind))


def _share(hits: Hits, kind: str) -> float:
    return _count(hits, kind) / hits.images


def _whole(row: Partial) -> list[Hits]:
    """The hits of a row in which nothing is missing."""
    found = [hits for hits in row if hits is not None]
    if len(found) < len(row):
        raise ValueError("not all test images were looked at")
    return found


def _check(rows: Sequence[Partial]) -> None:
    if not rows:
        raise ValueError("no evaluated task")
    for t, row in enumerate(rows):
        if len(row) != t + 1:
            raise ValueError(f"after task {t} there must be hits on {t + 1} tasks, not {len(row)}")
        if row[t] is None:
            raise ValueError(f"the test images of task {t} were not looked at after it")
        for i, hits in enumerate(row):
            own = rows[i][i]
            if hits is None or own is None:
                continue
            if hits.images < 1:
                raise ValueError(f"task {i} has no test image")
            if hits.images != own.images:
                raise ValueError(f"the number of test images of task {i} changed")
