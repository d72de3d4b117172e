"""Outputs of a learner, written down by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def make_outputs(
    heads: list[list[float]],
    row_task: list[int],
    row_class: list[int],
    calibrated: list[list[float]] | None = None,
    tasks: list[list[float]] | None = None,
    readout: str = "heads",
) -> Any:
    """Outputs with the given probabilities, not logarithms: of rows (n, R) and of tasks (n, T)."""

    def log(p: list[list[float]] | None) -> torch.Tensor | None:
        return None if p is None else torch.tensor(p).log()

    return SimpleNamespace(
        heads=log(heads),
        calibrated=log(calibrated),
        task_posterior=log(tasks),
        familiarity=torch.ones(len(heads)),
        row_task=torch.tensor(row_task),
        row_class=torch.tensor(row_class),
        readout=readout,
    )
