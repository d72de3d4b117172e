"""A comparison of methods: their runs, the figures of each, and which of them lead by more than the spread.

Everything here is made from the contents of ``results.json`` files alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from duallora.predictions import READOUTS

Results = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One line: a method under one configuration.

    Attributes:
        name: Of the line.
        method: Registered name.
        reconstruction: Whether parts of the method are a guess.
        upper_bound: Whether it saw all images at once.
        seeds: Of the runs, in their order.
        runs: Contents of their ``results.json``.
    """

    name: str
    method: str
    reconstruction: bool
    upper_bound: bool
    seeds: tuple[int, ...]
    runs: tuple[Results, ...]

    @property
    def label(self) -> str:
        """The name with what has to be known about it."""
        notes = ["reconstruction"] * self.reconstruction + ["all data at once"] * self.upper_bound
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    @property
    def readout(self) -> str:
        """The method's own readout."""
        return str(self.runs[0]["readout"])


class Figure(NamedTuple):
    """A figure of a run under one readout; ``better`` is 1 or -1 for higher or lower, 0 for neither."""

    key: str
    title: str
    better: int
    get: Callable[[Results, str], float | None]


class Spread(NamedTuple):
    """Mean over seeds; sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None


def _of_readout(key: str) -> Callable[[Results, str], float | None]:
    def get(run: Results, readout: str) -> float | None:
        value: float | None = run["readouts"][readout][key]
        return value

    return get


def _between_tasks(get: Callable[[Results, str], float | None]) -> Callable[[Results, str], float | None]:
    """A figure about several tasks, which a method that learned all at once does not have."""
    return lambda run, readout: get(run, readout) if len(run["tasks"]) > 1 else None


def _across_tasks(key: str, title: str, better: int) -> Figure:
    return Figure(key, title, better, _between_tasks(_of_readout(key)))


def _given_task(run: Results, readout: str) -> float:
    """Share of test images right after the last task, probabilities restricted to the true task."""
    row: list[float] = run["readouts"][readout]["oracle_accuracy_matrix"][-1]
    images: list[int] = [task["test_images"] for task in run["tasks"]]
    return sum(share * n for share, n in zip(row, images, strict=True)) / sum(images)


ACCURACIES: tuple[Figure, ...] = (
    Figure("final_accuracy", "final", 1, _of_readout("final_accuracy")),
    _across_tasks("final_row_accuracy", "class and task right", 1),
    Figure("final_accuracy_task_mean", "mean over tasks", 1, _of_readout("final_accuracy_task_mean")),
    Figure("given_task", "given the task", 1, _between_tasks(_given_task)),
    _across_tasks("average_incremental_accuracy", "average incremental", 1),
    _across_tasks("forgetting", "forgetting", -1),
    _across_tasks("forgetting_given_task", "forgetting given the task", -1),
    _across_tasks("backward_transfer", "backward transfer", 1),
    _across_tasks("task_identity_accuracy", "task of the largest row", 1),
    Figure(
        "task_posterior_accuracy",
        "task of the posterior",
        1,
        _between_tasks(lambda run, _: run["task_posterior_accuracy"]),
    ),
    Figure("calibration_error", "calibration error", -1, _of_readout("calibration_error")),
)
"""All are shares in [0, 1]; each is there for every readout."""

_PARTS = ("prepare_seconds", "learn_seconds", "consolidate_seconds")
COSTS: tuple[Figure, ...] = (
    Figure(
        "trainable_mb",
        "trained a task, MB",
        -1,
        lambda run, _: 4e-6 * max(task["trainable_parameters"] for task in run["tasks"]),
    ),
    Figure("stored_mb", "stored, MB", -1, lambda run, _: 1e-6 * run["tasks"][-1]["stored_bytes"]),
    Figure(
        "training_seconds",
        "training, s",
        -1,
        lambda run, _: sum(task[part] for task in run["tasks"] for part in _PARTS),
    ),
    Figure("images_per_second", "images/s", 1, lambda run, _: run["inference"]["images_per_second"]),
    Figure("forward_passes", "passes", -1, lambda run, _: run["inference"]["forward_passes_per_image"]),
)
"""The same for every readout."""


def readouts(entry: Entry) -> list[str]:
    """The readouts that a line has in all its runs."""
    return [name for name in READOUTS if all(run["readouts"][name] is not None for run in entry.runs)]


def spread(entry: Entry, figure: Figure, readout: str) -> Spread | None:
    """A figure over a line's seeds; None where the line does not have it."""
    if readout not in readouts(entry):
        return None
    values = [value for value in (figure.get(run, readout) for run in entry.runs) if value is not None]
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def marks(entries: Sequence[Entry], column: Sequence[Spread | None], better: int) -> list[str]:
    """For every line ``"best"``, ``"second"`` or ``""``.

    A line is marked only where its lead over every line behind it exceeds the larger standard deviation of
    the two. A line with one seed has no spread of its own: it is never marked, and counts with the column's
    largest. The upper bound takes no part, with its spread neither. Nothing is second where nothing is best.
    """
    found = ["" for _ in entries]
    rivals = [
        (better * s.mean, i)
        for i, (entry, s) in enumerate(zip(entries, column, strict=True))
        if s is not None and not entry.upper_bound
    ]
    deviations = [s.deviation for _, i in rivals if (s := column[i]) is not None and s.deviation is not None]
    if not better or not deviations:
        return found
    rivals.sort(reverse=True)
    for place, name in enumerate(("best", "second")):
        if place + 1 >= len(rivals):
            break
        value, i = rivals[place]
        if not all(
            value - other > max(_deviation(column[i], deviations), _deviation(column[j], deviations))
            for other, j in rivals[place + 1 :]
        ):
            break
        leader = column[i]
        if leader is None or leader.deviation is None:
            break
        found[i] = name
    return found


def _deviation(value: Spread | None, all_: Sequence[float]) -> float:
    return max(all_) if value is None or value.deviation is None else value.deviation


def curves(entry: Entry, readout: str) -> dict[int, Spread]:
    """Accuracy over all classes seen so far by number of tasks learned, over the line's seeds."""
    steps = zip(*(run["readouts"][readout]["incremental_accuracy"] for run in entry.runs), strict=True)
    return {
        number: Spread(statistics.mean(s), statistics.stdev(s) if len(s) > 1 else None)
        for number, s in enumerate(steps, start=1)
        if None not in s
    }
