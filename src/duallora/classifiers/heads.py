"""Linear heads, one a task, and the calibration that makes their logits comparable across tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duallora.classifiers.class_statistics import below_peak
from duallora.storage.learned import Learned


class Heads(Learned):
    """``head_t``: Linear(d, |Y_t|), trained in task t and frozen afterwards.

    Args:
        dim: d, width of the final feature; a head reads the first d columns of what it is given.
        device: where the heads live.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(device)
        self.dim = dim
        self.tasks = nn.ModuleList()

    def open(self, classes: int, generator: torch.Generator) -> None:
        """Adds the head of a new task, drawn from ``generator``; the earlier heads are frozen."""
        self.requires_grad_(False)
        head = nn.utils.skip_init(
            nn.Linear, self.dim, classes
        )  # its own draws would disturb the global generator
        bound = self.dim**-0.5
        with torch.no_grad():
            head.weight.uniform_(-bound, bound, generator=generator)
            head.bias.zero_()
        self.tasks.append(head.to(self.device))

    @torch.no_grad()
    def imprint(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the current head: weight (|Y_t|, d) and bias (|Y_t|,)."""
        head = self.tasks[-1]
        head.weight.copy_(weight)  # type: ignore[operator]
        head.bias.copy_(bias)  # type: ignore[operator]

    @torch.no_grad()
    def forget(self, task: int, kept: Tensor) -> None:
        """Loses outputs of the head of ``task``; ``kept`` (|Y_t|,), bool, says which of them stay."""
        head, kept = self.tasks[task], kept.to(self.device)
        head.weight = nn.Parameter(head.weight[kept], requires_grad=False)  # type: ignore[index]
        head.bias = nn.Parameter(head.bias[kept], requires_grad=False)  # type: ignore[index]
        head.out_features = int(kept.sum())  # type: ignore[assignment]

    @torch.no_grad()
    def shift(self, weight: Tensor, bias: Tensor) -> None:
        """Adds the same weight (d,) and bias () to every output: no softmax over them changes."""
        for head in self.tasks:
            head.weight.add_(weight)  # type: ignore[operator]
            head.bias.add_(bias)  # type: ignore[operator]

    def current(self, f: Tensor) -> Tensor:
        """Logits over the current task's classes (n, |Y_t|)."""
        logits: Tensor = self.tasks[-1](f[:, : self.dim])
        return logits

    def forward(self, f: Tensor) -> Tensor:
        """Logits of all heads side by side (n, R)."""
        return torch.cat([head(f[:, : self.dim]) for head in self.tasks], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Opens the heads that are loaded; their shapes say how many there are."""
        self.tasks = nn.ModuleList()
        for task in range(sum(name.startswith(prefix) and name.endswith(".weight") for name in state_dict)):
            classes = state_dict[f"{prefix}tasks.{task}.weight"].shape[0]
            self.open(max(classes, 1), torch.Generator())
            if not classes:  # forgotten; torch makes no layer without outputs and without a warning
                self.forget(task, torch.zeros(1, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def refresh(self) -> None:
        """Loaded heads are frozen."""
        self.requires_grad_(False)


def within_tasks(log_rows: Tensor, row_task: Tensor, tasks: int) -> Tensor:
    """Normalises logits over rows (n, R) inside each task: log-probability of the class given the task."""
    below, peak = below_peak(log_rows, row_task, tasks)
    total = torch.zeros_like(peak).index_add_(1, row_task, below.exp())
    return below - total.log()[:, row_task]  # the peak is not added again: it may be large, and would round


def calibrate(
    logits: Tensor, log_q: Tensor, log_task: Tensor, row_task: Tensor, kind: str, tau: float
) -> Tensor:
    """Log-probability of every row (n, R) from heads, class model and task identity.

    Args:
        logits: of all heads side by side (n, R).
        log_q: log-posterior of the class model over rows (n, R).
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
