"""Gaussian rows with one shared covariance: scores, distances, and both without an image's own share.

In the coordinates ``z = (f - m) C^-T`` with ``Sigma = C C^T`` (m: mean of the row means) the score
``s_c = f Sigma^-1 mu_c^T - 1/2 mu_c Sigma^-1 mu_c^T`` is ``z nu_c^T - |nu_c|^2 / 2`` up to a term that is the
same for all rows, and the Mahalanobis distance is ``|z - nu_c|``: one triangular solve in fp64 when rows
change, small fp32 products afterwards. In scores, rows of few images beside rows of many count with a share
of their ``nu_c`` only (``few_images``); distances are to the means as they were found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from duallora.classifiers.covariance import whitening
from duallora.classifiers.few_images import shares, spread_of_means


class Own(NamedTuple):
    """For leave-one-out scores: each image's own row (n,) and its feature f0 (n, d) in the latest pass."""

    row: Tensor
    f0: Tensor


class SharedGaussian:
    """Gaussians with means of their own and one covariance, laid out for scoring.

    Args:
        mean: (R, d), fp64.
        count: images of each (R,), fp64.
        covariance: (d, d), fp64, as it was found and regularised on the diagonal; None without rows.
        device: where scores are computed.
        shrinks: whether rows of few images count with a share of their ``nu``.

    Attributes:
        nu: means in whitened coordinates (R, d), fp32.
        map: features into whitened coordinates (d, d), fp32.
        centre: mean of the means (d,), fp32.
        count: images of each (R,), fp32.
        counted: what scores take of ``nu`` (R, d), fp32.
    """

    def __init__(
        self,
        mean: Tensor,
        count: Tensor,
        covariance: tuple[Tensor, Tensor] | None,
        device: torch.device,
        *,
        shrinks: bool = True,
    ) -> None:
        self._trace, self._between, self._shrinks = 0.0, 0.0, shrinks
        if covariance is None:
            nu, inverse = mean, torch.zeros(mean.shape[1], 0)  # there is nothing to be far from
            centre = torch.zeros(mean.shape[1], dtype=torch.float64)
        else:
            centre = mean.mean(0)
            found, sigma = covariance
            nu, inverse = whitening(sigma, mean - centre, device)
            # tr(S), S = C^-1 found C^-T; C C^T differs from what was found on the diagonal alone.
            added = (sigma - found).diagonal().to(inverse.device)
            self._trace = len(sigma) - float((added * inverse.square().sum(1)).sum())
            self._between = spread_of_means(nu.cpu(), count, self._trace)
        self.nu, self.map = nu.float().to(device), inverse.float().to(device)
        self.centre, self.count = centre.float().to(device), count.float().to(device)
        self._most = float(self.count.max()) if len(self.count) else 0.0  # here once: a GPU would wait for it
        self._share = self.shares(self.count)
        self.counted = self._share[:, None] * self.nu
        self._half = self.nu.square().sum(1) / 2
        self._counted_half = self.counted.square().sum(1) / 2

    def shares(self, count: Tensor) -> Tensor:
        """Share of ``nu`` that scores take of rows with so many images each (k,), beside these rows."""
        if not self._shrinks or not len(self.count):
            return torch.ones_like(count)
        return shares(count, self._most, self._between, self._trace)

    def whitened(self, f: Tensor) -> Tensor:
        """Features (n, d) in the coordinates ``z`` of this module, around the mean of the row means."""
        whitened: Tensor = (f.float() - self.centre) @ self.map
        return whitened

    def scores(self, z: Tensor, own: Own | None = None) -> Tensor:
        """Row scores ``s`` (n, R) up to a constant per image, for features in whitened coordinates (n, d)."""
        scores = self._scored(z @ self.nu.T)
        if own is None:
            return scores
        share = self.shares(self.count[own.row] - 1)
        return self._without_own(scores, z, own, share[:, None] * self._left_out(own))

    def nearest(self, z: Tensor, own: Own | None = None) -> tuple[Tensor, Tensor]:
        """Smallest Mahalanobis distance to a mean (n,) and the row it belongs to (n,)."""
        products: Tensor = z @ self.nu.T
        if own is None:
            return self._nearest(z, products - self._half)
        return self._nearest(z, self._without_own(products - self._half, z, own, self._left_out(own)))

    def scores_and_nearest(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """:meth:`scores` and :meth:`nearest` from one product with the means."""
        products = z @ self.nu.T
        return self._scored(products), self._nearest(z, products - self._half)

    def _scored(self, products: Tensor) -> Tensor:
        scores: Tensor = self._share * products - self._counted_half
        return scores

    @staticmethod
    def _nearest(z: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        best, row = (z.square().sum(1, keepdim=True) - 2 * scores).min(1)
        return best.clamp(min=0).sqrt(), row

    def _without_own(self, scores: Tensor, z: Tensor, own: Own, nu: Tensor) -> Tensor:
        """Scores with that of the own row from ``nu`` (n, d), its mean without the image."""
        value = (z * nu).sum(1) - nu.square().sum(1) / 2
        # Without its only image a row does not exist; where it is the only row, it stays.
        alone = (self.count[own.row] <= 1) & (len(self.count) > 1)
        return scores.scatter(1, own.row[:, None], torch.where(alone, -torch.inf, value)[:, None])

    def unseen_distance(self, f: Tensor, own: Own, freedom: float) -> Tensor:
        """Smallest distance (n,) of each image to a row, had it been in neither a mean nor the covariance.

        With few images per direction an image pulls the covariance towards itself, and new images of its
        class lie much further out. Without image i the scatter loses ``n/(n-1) v^T v`` (v: its offset
        from its row mean), so by Sherman and Morrison ``d_c^2 = |w_c|^2 + k (w_c v^T)^2 / (1 - k |v|^2)`` in
        whitened coordinates, ``k = n / ((n - 1)(N - R))``; the regularisation is left as it is.
        """
        z, nu = self.whitened(f), self.nu
        n = self.count[own.row].clamp(min=2)
        v = z - nu[own.row]
        u = v.square().sum(1)
        k = n / ((n - 1) * max(freedom, 1.0))
        shrink = k / (1 - k * u).clamp(min=1e-6)
        square = z.square().sum(1, keepdim=True) - 2 * z @ nu.T + nu.square().sum(1)
        square = square + shrink[:, None] * ((z * v).sum(1, keepdim=True) - v @ nu.T).square()
        mine = (n / (n - 1)).square() * (u + shrink * u.square())
        nearest: Tensor = square.scatter(1, own.row[:, None], mine[:, None]).min(1).values
        return nearest.clamp(min=0).sqrt().cpu()

    def _left_out(self, own: Own) -> Tensor:
        n = self.count[own.row].clamp(min=2)[:, None]
        nu: Tensor = (n * self.nu[own.row] - self.whitened(own.f0)) / (n - 1)
        return nu
