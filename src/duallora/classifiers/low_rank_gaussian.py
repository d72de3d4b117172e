"""A Gaussian discriminant whose class covariances are low-rank beside a shared one (after LR-RGDA).

``Sigma_c = a1 F_c F_c^T + a2 S + a3 I``: F_c F_c^T (F_c: d x r) is the class's own covariance in its r
largest directions, S the mean covariance. With ``C C^T = a2 S + a3 I`` and features in the coordinates
``z = f C^-T``, where the shared part is the identity, Woodbury's formula gives the distance of class c:

    |v|^2 - |v P_c|^2,   v = z - nu_c,   P_c = V_c L_c^-T,
    V_c = sqrt(a1) C^-1 F_c,   L_c L_c^T = I + V_c^T V_c

so that scoring costs R r d products an image instead of R d^2. "LR-RGDA / HopDC" (arXiv 2602.00144).
"""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.classifiers.class_statistics import ByRow
from duallora.classifiers.covariance import whitening
from duallora.runtime import parallel

_CHUNK = 16  # covariances are decomposed in chunks of this many


class Factors(ByRow):
    """Factors F (R, d, r) of every row's own covariance, fp32 on the CPU.

    Args:
        dim: d.
        rank: r, at most d.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.rank = min(rank, dim)
        self.factor: Tensor
        self.register_buffer("factor", torch.zeros(0, dim, self.rank))

    def replace(self, covariance: Tensor) -> None:
        """Of all rows anew: ``F F^T`` is the covariance (R, d, d) in its r largest directions."""

        def compute() -> tuple[Tensor, ...]:
            return (torch.cat([largest(part, self.rank).flatten(1) for part in covariance.split(_CHUNK)]),)

        self.factor = parallel.once(compute)[0].reshape(-1, *self.factor.shape[1:])

    def forget(self, kept: Tensor) -> None:
        """Loses rows; ``kept`` (R,), bool, says which stay."""
        self.factor = self.factor[kept]

    def simulate(self, rows: int) -> None:
        """So many rows of no meaning, for measurements."""
        self.factor = torch.eye(*self.factor.shape[1:]).repeat(rows, 1, 1)


def largest(covariance: Tensor, rank: int) -> Tensor:
    """F (R, d, r), fp32, with ``F F^T`` the covariance (R, d, d) in its r largest directions."""
    values, vectors = torch.linalg.eigh(covariance.double())
    factor: Tensor = vectors[..., -rank:] * values[..., -rank:].clamp(min=0).sqrt()[:, None]
    return factor.float()


class LowRankGaussian:
    """The discriminant laid out for scoring.

    Args:
        mean: of the rows (R, d).
        shared: S (d, d).
        factor: F (R, d, r).
        weights: a1, a2 and a3; a3 above 0.
        device: where scores are computed.
    """

    def __init__(
        self,
        mean: Tensor,
        shared: Tensor,
        factor: Tensor,
        weights: tuple[float, float, float],
        device: torch.device,
    ) -> None:
        own, common, identity = weights
        mean = mean.double()
        centre = mean.mean(0)
        base = common * shared.double() + identity * torch.eye(len(shared), dtype=torch.float64)
        nu, inverse = (x.cpu() for x in whitening(base, mean - centre, device))
        whitened = own**0.5 * factor.double().mT @ inverse  # V^T (R, r, d)
        inner = torch.linalg.cholesky(
            torch.eye(factor.shape[2], dtype=torch.float64) + whitened @ whitened.mT
        )
        projection = torch.linalg.solve_triangular(inner, whitened, upper=False)  # P^T (R, r, d)
        # The shared part's determinant is the same for all.
        log_det = 2 * inner.diagonal(dim1=1, dim2=2).log().sum(1)
        self.centre, self.map = centre.float().to(device), inverse.float().to(device)
        self.nu, self.projection = nu.float().to(device), projection.flatten(0, 1).T.float().to(device)
        self.within = (projection @ nu[:, :, None])[..., 0].float().to(device)  # nu P (R, r)
        self.constant = (nu.square().sum(1) / 2 + log_det / 2).float().to(device)

    def scores(self, f: Tensor) -> Tensor:
        """Log-density of the rows up to a constant (n, R), for features (n, d) and equal priors."""
        z = (f.float() - self.centre) @ self.map
        within = (z @ self.projection).unflatten(1, self.within.shape) - self.within  # v P (n, R, r)
        scores: Tensor = z @ self.nu.T - self.constant + within.square().sum(2) / 2
        return scores
