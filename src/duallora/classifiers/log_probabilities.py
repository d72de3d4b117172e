"""Sums and softmaxes of probabilities that are given as logs, over the rows of a task or of a class."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_rows(log_rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums probabilities given as logs (n, R) over the rows of each group (R,) -> (n, groups), as logs.

    Works for tasks and for class names alike; a group without rows gets ``-inf``.
    """
    below, peak = below_peak(log_rows, group, groups)
    total = torch.zeros_like(peak).index_add_(1, group, below.exp())
    return total.log() + peak


def below_peak(log_rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Logs (n, R) less the largest of their group (R,), and these (n, groups); 0 for one that is empty.

    The peak is taken per group: one far below the best must not underflow, because the shares inside it are
    still asked for.
    """
    peak = log_rows.new_full((log_rows.shape[0], groups), -torch.inf)
    peak = peak.scatter_reduce(1, group.expand_as(log_rows), log_rows, "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    return log_rows - peak[:, group], peak


def within_tasks(log_rows: Tensor, row_task: Tensor, tasks: int) -> Tensor:
    """Normalises logits over rows (n, R) inside each task: log-probability of the class given the task."""
    below, peak = below_peak(log_rows, row_task, tasks)
    total = torch.zeros_like(peak).index_add_(1, row_task, below.exp())
    return below - total.log()[:, row_task]  # the peak is not added again: it may be large, and would round
