"""Linear heads, one a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
    def imprint(self, weight: Tensor, bias: Tensor, task: int = -1) -> None:
        """Sets the head of a task, or the current one: weight (|Y_t|, d) and bias (|Y_t|,)."""
        head = self.tasks[task]
        head.weight.copy_(weight)  # type: ignore[operator]
        head.bias.copy_(bias)  # type: ignore[operator]

    def copy_latest(self, other: Heads) -> None:
        """Adds a copy of the latest head of ``other``."""
        weight, bias = other.tasks[-1].weight.detach(), other.tasks[-1].bias.detach()  # type: ignore[operator]
        self.open(len(bias), torch.Generator())
        self.imprint(weight, bias)

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
            classes, self.dim = state_dict[f"{prefix}tasks.{task}.weight"].shape
            self.open(max(classes, 1), torch.Generator())
            if not classes:  # forgotten; torch makes no layer without outputs and without a warning
                self.forget(task, torch.zeros(1, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def refresh(self) -> None:
        """Loaded heads are frozen."""
        self.requires_grad_(False)
