"""What other seeds and other test images would have given: a bootstrap of the final accuracies of all lines.

A draw takes test images with replacement, within each class, and seeds with replacement. All lines get the
same images in a draw, and lines of the same seeds the same seeds: what makes an image or an order of classes
hard for all of them cancels in a difference. Of n seeds, n - 1 are drawn, so that the variance of their mean
is that of the sample, divided by n (Rao and Wu, JASA 1988); drawing n of three would give two thirds of it.

McNemar's test is not used, because it takes the pairs of answers for independent, and the answers of three
seeds to one image are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duallora.runs.answers import Answers, unpacked
from duallora.runs.comparison import Entry, Results, readouts

DRAWS = 4000
_LEVELS = (0.025, 0.975)
_CELLS = 2**22  # of the counts that are held at a time


class Interval(NamedTuple):
    """The middle 95 % of draws."""

    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """Final accuracies under every draw.

    Attributes:
        accuracies: By line and readout (draws,), float64, shares in [0, 1].
        images: By line and readout, the hash of the test images; None where a run has no answers by image.
    """

    accuracies: Mapping[tuple[str, str], Tensor]
    images: Mapping[tuple[str, str], str | None]

    def paired(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        """Whether two lines, each under a readout, were drawn on the same images."""
        return self.images[one] is not None and self.images[one] == self.images[other]


def resample(entries: Sequence[Entry], draws: int = DRAWS) -> Draws:
    """Draws seeds and test images for all lines; the draws are the same whenever they are made.

    A run that has no answers by image is drawn apart from all others, by its accuracy and its number of
    images alone.

    Args:
        entries: The lines.
        draws: How many.

    Raises:
        DualLoRAError: The answers of a run contradict its accuracies.
    """
    generator = torch.Generator().manual_seed(0)
    answers = {entry.name: [unpacked(run) for run in entry.runs] for entry in entries}
    runs: dict[tuple[str, str, int], Tensor] = {}
    for shared in _by_images(answers).values():
        runs |= _drawn_images(shared, draws, generator)
    seeds: dict[tuple[int, ...], Tensor] = {}
    accuracies = {}
    for entry in entries:
        count = len(entry.seeds)
        if entry.seeds not in seeds:
            seeds[entry.seeds] = torch.randint(count, (max(1, count - 1), draws), generator=generator)
        for readout in readouts(entry):
            each = []
            for place, run in enumerate(entry.runs):
                drawn = runs.get((entry.name, readout, place))
                each.append(_by_count(run, readout, draws, generator) if drawn is None else drawn)
            accuracies[entry.name, readout] = torch.stack(each).gather(0, seeds[entry.seeds]).mean(0)
    return Draws(accuracies, {key: _images(answers[key[0]], key[1]) for key in accuracies})


def interval(values: Tensor) -> Interval:
    """The middle 95 % of draws (draws,)."""
    low, high = torch.quantile(values, torch.tensor(_LEVELS, dtype=values.dtype)).tolist()
    return Interval(low, high)


def p_value(differences: Tensor) -> float:
    """Two-sided: how often a draw of the difference (draws,) lies on the other side of zero.

    It is never 0: with all draws on one side it is 2 / (draws + 1).
    """
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(differences) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for so many tests at once (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, largest = [1.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[i]))
        found[i] = largest
    return found


_Run = tuple[tuple[str, str, int], Tensor]
"""Line, readout and place of a run, and its answers (n,)."""


def _by_images(
    answers: Mapping[str, Sequence[Answers | None]],
) -> dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], list[_Run]]]:
    """The runs on the same images together, with the number of images of every class."""
    found: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], list[_Run]]] = {}
    for name, each in answers.items():
        for place, own in enumerate(each):
            if own is not None:
                _, runs = found.setdefault((own.images_sha256, own.by_class), (own.by_class, []))
                runs += [((name, readout, place), right) for readout, right in own.right.items()]
    return found


def _drawn_images(
    shared: tuple[tuple[int, ...], list[_Run]], draws: int, generator: torch.Generator
) -> dict[tuple[str, str, int], Tensor]:
    """Accuracy of every run under every draw of the images, (draws,) each."""
    by_class, runs = shared
    sizes = torch.tensor(by_class)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    size = sizes.repeat_interleave(sizes)
    right = torch.stack([bits for _, bits in runs], dim=1).float()
    hits, images = [], len(right)
    for start in range(0, draws, step := max(1, _CELLS // images)):
        number = min(step, draws - start)
        # The clamp: a product that is rounded up would be the next class's first image.
        within = (torch.rand(number, images, generator=generator) * size).long().clamp(max=size - 1)
        times = torch.zeros(number, images).scatter_add_(1, first + within, torch.ones(number, images))
        hits.append(times @ right)  # whole numbers below 2**24: exact
    shares = torch.cat(hits).double() / images
    return {key: shares[:, column] for column, (key, _) in enumerate(runs)}


def _by_count(run: Results, readout: str, draws: int, generator: torch.Generator) -> Tensor:
    """Accuracy of a run under draws of its images that no other run shares, (draws,)."""
    images: int = sum(task["test_images"] for task in run["tasks"])
    share = run["readouts"][readout]["final_accuracy"]
    hits: Tensor = torch.binomial(
        torch.full((draws,), float(images)), torch.tensor(share), generator=generator
    )
    return hits.double() / images


def _images(found: Sequence[Answers | None], readout: str) -> str | None:
    hashes = {own.images_sha256 if own is not None and readout in own.right else None for own in found}
    return hashes.pop() if len(hashes) == 1 else None
