"""Where an image is called unknown: the familiarity that new images of known classes rarely fall below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

KEPT = 0.95
"""Share of new images of known classes that are not called unknown."""

_ENOUGH = 19  # images: the least of so many is below 5 of 100 new ones
# One-sided 95 % quantiles of Student's t, by degrees of freedom from 1 on.
_STUDENT = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833),
    *(1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740),
)
_SMALLEST = 1e-6


def unknown_below(familiarity: Sequence[float]) -> float | None:
    """The familiarity that 95 of 100 new images of the same classes lie above, judged by held-back ones.

    From 19 images on it is the k-th smallest, k = floor(.05 (n + 1)): in the mean over such draws, no more
    than 5 % of new images lie below (split conformal prediction). Fewer say too little of so rare a thing;
    then it is the lower end of Student's prediction interval for the log odds of the familiarity,
    ``mean - t s sqrt(1 + 1/n)``.

    Args:
        familiarity: of held-back images, in [0, 1].

    Returns:
        The value; None of fewer than two images.
    """
    count = len(familiarity)
    if count < 2:
        return None
    values = torch.tensor(familiarity, dtype=torch.float64).sort().values
    if count >= _ENOUGH:
        return float(values[math.floor((1 - KEPT) * (count + 1) + 1e-9) - 1])
    odds = values.clamp(_SMALLEST, 1 - _SMALLEST).logit()
    reach = _STUDENT[count - 2] * math.sqrt(1 + 1 / count) * odds.std()
    return float((odds.mean() - reach).sigmoid())
