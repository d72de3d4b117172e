"""Blurred boundaries: classes come back in later tasks, with images that were not shown before."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from duallora.errors import DualLoRAError
from duallora.streams.task import Stream, Task, TaskDataset, concatenated, positions_by_class

_ALPHABETICAL_SEED = 1993


def with_repeats(stream: Stream, share: float) -> Stream:
    """Brings classes back in later tasks.

    In every task after the first, a share of the classes of the tasks before it comes back: the nearest whole
    number of them, at least one, drawn by the seed of the class order (1993 for the alphabetical one). The
    training images of a class are shuffled and divided equally among its own task and those it comes back in,
    so no image is shown twice and none is lost; a class comes back at most so often that each time has an
    image. Test images stay with the task that teaches their class first, so each is counted once.

    Args:
        stream: its tasks have no class in common.
        share: of the classes seen so far, from 0 (nothing changes) to below 1.

    Returns:
        The same tasks; the training images of those after the first have more classes than their test images.

    Raises:
        DualLoRAError: the share is out of range, or tasks have classes in common already.
    """
    if not 0 <= share < 1:
        raise DualLoRAError(f"repeat is a share of the classes seen, from 0 to below 1, not {share}")
    if not share:
        return stream
    home = {name: t for t, task in enumerate(stream) for name in task.train.classes}
    if len(home) < sum(len(task.train.classes) for task in stream):
        raise DualLoRAError(
            "repeat brings classes of earlier tasks back, and here every task has them all: leave it out"
        )
    seed = stream.order_seed if isinstance(stream.order_seed, int) else _ALPHABETICAL_SEED
    shares = {
        name: _divided(stream.tasks[home[name]].train, name, visits, seed)
        for name, visits in _visits(stream, share, seed).items()
    }
    tasks = [_with_guests(stream, t, home, shares) for t in range(len(stream))]
    return replace(stream, name=f"{stream.name} (repeat {share:g})", tasks=tuple(tasks))


def _visits(stream: Stream, share: float, seed: int) -> dict[str, list[int]]:
    """Per class, its own task and those it comes back in."""
    visits: dict[str, list[int]] = {}
    for t, task in enumerate(stream):
        seen = list(visits)
        number = max(1, int(share * len(seen) + 0.5)) if seen else 0
        drawn = np.random.RandomState([seed, t]).permutation(len(seen))[:number]
        for i in sorted(drawn.tolist()):
            visits[seen[i]].append(t)
        visits |= {name: [t] for name in task.train.classes}
    return visits


def _divided(view: TaskDataset, name: str, visits: Sequence[int], seed: int) -> dict[int, TaskDataset]:
    """The images of one class by the task that shows them."""
    own = positions_by_class(view)[view.classes.index(name)]
    visits = visits[: max(1, len(own))]
    shuffled = np.random.RandomState([seed, zlib.crc32(name.encode())]).permutation(own)
    parts = np.array_split(shuffled, len(visits))
    return {t: view.subset(sorted(part.tolist())) for t, part in zip(visits, parts, strict=True)}


def _with_guests(
    stream: Stream, t: int, home: Mapping[str, int], shares: Mapping[str, Mapping[int, TaskDataset]]
) -> Task:
    task = stream.tasks[t]
    guests = [name for name, parts in shares.items() if home[name] != t and t in parts]
    classes = [*task.train.classes, *guests]
    return replace(task, train=concatenated([shares[name][t] for name in classes], classes))
