"""Optimal transport between two sets of classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = 1000


def transport_plan(cost: Tensor, entropy: float) -> Tensor:
    """What share of each row goes to each column (n, m); rows add up to 1.

    The plan of least ``sum cost P + entropy sum P log P`` among those with equal rows and equal columns, by
    Sinkhorn's iteration on logarithms, which no ratio of cost and entropy takes to zero.

    Args:
        cost: (n, m), fp64.
        entropy: above 0; towards 0 every row goes to a single column.
    """
    log_kernel = -cost / entropy
    mass = math.log(len(cost) / cost.shape[1])  # of a column, where that of a row is 1
    columns = torch.zeros(cost.shape[1], dtype=cost.dtype)
    for _ in range(_STEPS):
        before = columns
        rows = -torch.logsumexp(log_kernel + columns, 1)
        columns = -torch.logsumexp(log_kernel + rows[:, None], 0) + mass
        if torch.allclose(columns, before, rtol=0, atol=1e-9):
            break
    return (log_kernel + columns).softmax(1)
