"""Wall-clock medians of several candidates, measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

SHORTEST = 0.2
"""Seconds that a sample should take: shorter calls are repeated inside it."""


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device, number: int = 1) -> float:
    """Seconds of one call, the device's queue included: mean over ``number`` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / number


def medians(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    *,
    warmup: int = 2,
    shortest: float | None = None,
) -> dict[str, float]:
    """Median seconds of every call.

    All candidates are called once a round, so that a change of the machine's speed meets all of them, and
    every second round goes the other way about, so that none always follows the same neighbour.

    Args:
        calls: the candidates.
        device: where they compute.
        repeats: rounds that count.
        warmup: calls of each before them.
        shortest: seconds that a sample should take; None is `SHORTEST`.
    """
    shortest = SHORTEST if shortest is None else shortest
    found: dict[str, list[float]] = {name: [] for name in calls}
    numbers: dict[str, int] = {}
    for name, call in calls.items():
        for _ in range(warmup):
            took = seconds(call, device)
        numbers[name] = max(1, min(1000, round(shortest / max(took, 1e-6))))
    for turn in range(repeats):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            found[name].append(seconds(calls[name], device, numbers[name]))
    return {name: statistics.median(values) for name, values in found.items()}
