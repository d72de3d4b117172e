"""What makes scores comparable across tasks: temperatures, and heads joined with class statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.classifiers.log_probabilities import within_tasks


def best_kappa(grid: Tensor, losses: dict[int, Tensor]) -> float:
    """The temperature of ``grid`` with the smallest loss summed over tasks; the largest among equals."""
    if not losses:
        return float(grid.max())
    total = torch.stack([losses[task] for task in sorted(losses)]).sum(0)
    return float(grid[total <= total.min()].max())


def calibrate(
    logits: Tensor, log_q: Tensor, log_task: Tensor, row_task: Tensor, kind: str, tau: float
) -> Tensor:
    """Log-probability of every row (n, R) from heads, class statistics and task identity.

    Args:
        logits: of all heads side by side (n, R).
        log_q: log-posterior of the class statistics over rows (n, R).
        log_task: log p(t | f) (n, T).
        row_task: the task of each row (R,).
        kind: ``"class"``: ``log p(t|f) + log_softmax_{c in t}(1/2 log_softmax(head_t)(c) + 1/2 log q(c))``;
            ``"task"``: ``log_softmax(head_t)(c) + tau log p(t|f)``, renormalised over rows.
        tau: weight of the task posterior for ``"task"``.
    """
    tasks = log_task.shape[1]
    if kind == "class":
        # The softmax inside a task does not see that the head's own has not been taken before.
        return log_task[:, row_task] + within_tasks((logits + log_q) / 2, row_task, tasks)
    head = within_tasks(logits, row_task, tasks)
    if tau:  # 0 times the -inf of a task without a basis would not be a number
        head = head + tau * log_task[:, row_task]
    return head.log_softmax(1)
