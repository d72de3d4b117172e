"""Which images a training mixes: drawn at random, keyed as crops are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

from duallora.data.assembly import Chunk
from duallora.data.transforms import Augmentation

SHARES = (0.4, 0.6)
"""Smallest and largest share of an image in the mean with another: neither of the two can be overlooked."""


class Mixing:
    """Gives every view of a batch a partner of another class, which is drawn evenly, as is its image.

    Every draw is keyed by (seed, task, epoch, sample index), and the partner's view is the one that it has in
    this epoch itself: a batch that is computed in pieces, or by several processes, is the same batch.

    Args:
        targets: class of every image of the data set; at least two classes have images.
        augmentation: makes the views; knows seed and task.
    """

    def __init__(self, targets: Sequence[int], augmentation: Augmentation) -> None:
        self._targets, self._augmentation = targets, augmentation
        members: dict[int, list[int]] = defaultdict(list)
        for position, target in enumerate(targets):
            members[target].append(position)
        self._members = [members[target] for target in sorted(members)]
        self._place = {target: place for place, target in enumerate(sorted(members))}

    def drawn(self, epoch: int, index: int) -> tuple[int, float]:
        """For one sample in one epoch: the sample it is mixed with, and its own share of the two."""
        augmentation = self._augmentation
        random = Random(f"{augmentation.seed:d}/{augmentation.task:d}/{epoch:d}/{index:d}/mixing")
        further = random.randrange(1, len(self._members))
        others = self._members[(self._place[self._targets[index]] + further) % len(self._members)]
        return random.choice(others), random.uniform(*SHARES)

    def asked(self, chunk: Chunk) -> Chunk:
        """The same chunk of an epoch with the partners of its samples behind them, in their order."""
        partners = [self.drawn(chunk.epoch or 0, index)[0] for index in chunk.positions]
        return Chunk((*chunk.positions, *partners), chunk.epoch)

    def shares(self, chunk: Chunk) -> list[float]:
        """What the samples of a chunk have of their mixtures."""
        return [self.drawn(chunk.epoch or 0, index)[1] for index in chunk.positions]
