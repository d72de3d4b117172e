"""Heads that lead a training in the place of the task's own, and are thrown away after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duallora.classifiers.heads import Heads
from duallora.methods.class_weights import ClassLoss


class Leader(nn.Module):
    """Heads drawn at random, each on one token of the last layer.

    One reads the final feature, and where that is not the mean patch token, another reads that. Class rows
    read both, and so both have to learn to tell classes apart.

    Args:
        columns: of the features that each head reads.
        classes: of the task.
        generator: what they are drawn from.
        device: where they live.
    """

    def __init__(
        self, columns: Sequence[slice], classes: int, generator: torch.Generator, device: torch.device
    ) -> None:
        super().__init__()
        self.columns = list(columns)
        self.heads = nn.ModuleList(Heads(each.stop - each.start, device) for each in columns)
        for head in self.heads:
            head.open(classes, generator)  # type: ignore[operator]

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits (n, |Y_t|) of each head, for features (n, row_dim)."""
        pairs = zip(self.heads, self.columns, strict=True)
        return [head.current(features[:, columns]) for head, columns in pairs]  # type: ignore[operator]

    def current(self, features: Tensor) -> Tensor:
        """One answer of all heads (n, |Y_t|): the mean of their log-probabilities."""
        return torch.stack([logits.log_softmax(1) for logits in self(features)]).mean(0)

    def loss(self, features: Tensor, labels: Tensor, class_loss: ClassLoss) -> Tensor:
        """Mean cross-entropy of the heads; ``labels`` (n,)."""
        found = [class_loss.cross_entropy(logits, labels) for logits in self(features)]
        return torch.stack(found).mean()
