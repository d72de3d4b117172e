"""Rows of few images beside rows of many: how far a mean can be trusted, after James and Stein.

The mean of n images misses the true one by ``S / n`` (S: the within-class covariance, in the coordinates in
which scores are taken), so that ``-|nu|^2 / 2`` is too low by ``tr(S) / (2 n)`` on average: a row of a few
images loses to those of many. Where true means lie ``b`` from their centre in the mean square, the best
linear guess of one is ``n b / (n b + tr(S))`` of what was found, which has no such excess and less noise as
well. To add ``tr(S) / (2 n)`` alone would leave the noise, and where classes lie close together such rows
would win most images (``docs/method.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(count: Tensor, most: float, between: float, trace: float) -> Tensor:
    """Share of ``nu`` that counts (k,), in [0, 1], where the mean comes from so many images.

    It is the best linear guess's share over the one of the row with the most images: rows of as many images
    each stay as they are.

    Args:
        count: images (k,).
        most: of the row with the most.
        between: b.
        trace: tr(S).
    """
    if trace <= 0 or most <= 0:
        return torch.ones_like(count)
    kept = count * (most * between + trace) / (most * (count * between + trace))
    return kept.clamp(0, 1).masked_fill(count >= most, 1.0)  # exactly, not up to rounding


def spread_of_means(nu: Tensor, count: Tensor, trace: float) -> float:
    """Mean squared distance b of true class means from their centre, by the one-way analysis of variance.

    ``b = (sum_c n_c |nu_c - m|^2 - (R - 1) tr(S)) / (N - sum_c n_c^2 / N)``, m the mean of all images, N
    their number: what sampling adds to the spread of the means is taken off. At least 0.

    Args:
        nu: means (R, d).
        count: images of each (R,).
        trace: tr(S).
    """
    total = float(count.sum())
    centre = (count[:, None] * nu).sum(0) / total
    between = float((count * (nu - centre).square().sum(1)).sum()) - (len(nu) - 1) * trace
    return max(between, 0.0) / max(total - float(count.square().sum()) / total, 1e-12)
