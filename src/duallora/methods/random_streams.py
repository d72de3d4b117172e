"""Named streams of random numbers, each the same on every device and after every resume."""

from __future__ import annotations

from typing import Literal

import torch

RandomStream = Literal[
    "head",
    "adapter",
    "shared adapter",
    "alignment",
    "expert prompts",
    "centres",
    "drift",
    "refit",
    "projector",
    "measurement",
    "measured rows",
]
"""What a method draws random numbers for."""

# Streams with the same number are of different methods; another number would be another model.
_STREAMS: dict[RandomStream, int] = {
    "head": 0,
    "adapter": 1,
    "shared adapter": 2,
    "alignment": 1,
    "expert prompts": 2,
    "centres": 2,
    "drift": 2,
    "refit": 3,
    "projector": 4,
    "measurement": 8,
    "measured rows": 9,
}


def generator(seed: int, task: int, stream: RandomStream) -> torch.Generator:
    """Random numbers for a use in a task.

    Args:
        seed: of the model.
        task: index of the task.
        stream: what is drawn.
    """
    return torch.Generator().manual_seed((_STREAMS[stream] * 1_000_033 + seed) * 1_000_003 + task)
