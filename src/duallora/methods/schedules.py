"""How learning rates fall over a task: the share of its rate that an optimiser step has."""

from __future__ import annotations

import math

import torch

from duallora.methods.interface import Loader
from duallora.runtime import parallel


def rate_share(schedule: str, step: int, steps: int, epochs: int) -> float:
    """The share of the learning rate at an optimiser step, in [0, 1].

    ``quarter-cosine`` is the schedule of the code that was released with CODA-Prompt and InfLoRA: a quarter
    of a cosine to 1.6 %, but the counter of epochs starts one late, so that the first two epochs have the
    full rate and the last one never gets there (4.7 / 9.7 / 39 % at 50 / 20 / 5 epochs).

    Args:
        schedule: as the field of every method.
        step: from 0.
        steps: of the task.
        epochs: of the task, all of the same number of steps.
    """
    epoch = step * epochs // steps
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    if schedule == "quarter-cosine":
        return math.cos(0.99 * math.pi / 2 * max(epoch - 1, 0) / max(epochs - 1, 1))
    if schedule == "step":
        return 0.1 if 5 * epoch >= 4 * epochs else 1.0
    return 1.0


def count_images(loader: Loader) -> int:
    """How many images a task has, in all processes together; one pass over them, without the model."""
    return int(parallel.total(torch.tensor([sum(len(batch.labels) for batch in loader())])))
