"""Heads that lead a training in the place of the task's own, and are thrown away after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.token_mixing import TokenMixing
from duallora.classifiers.heads import Heads
from duallora.methods.class_weights import ClassLoss
from duallora.methods.interface import Batch

MOST_MIXED = 20
"""Most classes of a task whose pairs are classes too: more teach enough, and have very many pairs."""


class Leader(nn.Module):
    """Heads drawn at random, each on one token of the last layer.

    One reads the final feature, and where that is not the mean patch token, another reads that. Class rows
    read both, and so both have to learn to tell classes apart. What images of two classes mixed look like is
    a class as well, one for each pair: features that three classes are told apart by are few, and classes
    that come later need others::

        outputs   0  1  ..  |Y_t|-1  (0,1)  (0,2)  ..  (1,2)  ..

    Args:
        columns: of the features that each head reads.
        classes: of the task.
        mixing: where images are mixed; None where nothing is.
        generator: what they are drawn from.
        device: where they live.
    """

    def __init__(
        self,
        columns: Sequence[slice],
        classes: int,
        mixing: TokenMixing | None,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.columns, self.classes = list(columns), classes
        self.mixing = mixing if classes <= MOST_MIXED else None
        self.heads = nn.ModuleList(Heads(each.stop - each.start, device) for each in columns)
        for head in self.heads:
            head.open(classes + (self.pairs if self.mixes else 0), generator)  # type: ignore[operator]

    @property
    def mixes(self) -> bool:
        """Whether its batches are to have partners."""
        return self.mixing is not None

    @property
    def pairs(self) -> int:
        """Of the task's classes."""
        return self.classes * (self.classes - 1) // 2

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits (n, outputs) of each head, for features (n, row_dim)."""
        pairs = zip(self.heads, self.columns, strict=True)
        return [head.current(features[:, columns]) for head, columns in pairs]  # type: ignore[operator]

    def current(self, features: Tensor) -> Tensor:
        """One answer of all heads (n, |Y_t|): the mean of their log-probabilities."""
        answers = [logits[:, : self.classes].log_softmax(1) for logits in self(features)]
        return torch.stack(answers).mean(0)

    def loss(self, batch: Batch, features_of: Callable[[Batch], Tensor], class_loss: ClassLoss) -> Tensor:
        """Mean cross-entropy of the heads over the images of a batch and their mixtures.

        Args:
            batch: of images, with partners or without.
            features_of: features (n, row_dim) of a batch's images.
            class_loss: weighs the classes; a mixture counts as its own image does.
        """
        if self.mixing is None or batch.partners is None:
            features, own, right = features_of(batch), batch.labels, batch.labels
        else:
            images, labels, shares = batch.partners
            own = batch.labels.repeat(2)
            with self.mixing.mixing(shares):
                both = torch.cat([batch.images, images])
                features = features_of(Batch(both, own, batch.indices.repeat(2)))
            right = torch.cat([batch.labels, self.pair(batch.labels, labels)])
        found = [F.cross_entropy(logits, right, reduction="none") for logits in self(features)]
        return class_loss.mean(torch.stack(found).mean(0), own)

    def pair(self, one: Tensor, other: Tensor) -> Tensor:
        """Outputs (n,) of pairs of classes (n,) and (n,), which differ."""
        first, second = torch.minimum(one, other), torch.maximum(one, other)
        before = first * (2 * self.classes - first - 1) // 2  # pairs of the classes in front of the first
        return self.classes + before + second - first - 1
