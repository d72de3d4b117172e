"""A within-class covariance: how it is regularised, and the coordinates in which it is the identity."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKED = 1024  # triangles wider than this are inverted by halves


def whitening(sigma: Tensor, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in whitened coordinates and the map that takes features there, fp64.

    Args:
        sigma: covariance (d, d) = C C^T.
        rows: (R, d).
        device: where it is computed if it has fast fp64 (CUDA); else on the CPU.

    Returns:
        ``rows C^-T`` (R, d) and ``C^-T`` (d, d).
    """
    if device.type == "cuda":
        sigma, rows = sigma.to(device), rows.to(device)
    factor = torch.linalg.cholesky(sigma)
    if len(factor) > _BLOCKED:
        inverse = inverse_triangle(factor).T
        return rows @ inverse, inverse
    nu: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return nu, torch.linalg.solve_triangular(factor, eye, upper=False).T


def inverse_triangle(lower: Tensor) -> Tensor:
    """Inverse of a lower triangle (d, d) by halves, a third of the work of solving for the identity."""
    dim = len(lower)
    if dim <= _BLOCKED // 4:
        eye = torch.eye(dim, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    half, result = dim // 2, torch.zeros_like(lower)
    first, last = inverse_triangle(lower[:half, :half]), inverse_triangle(lower[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ lower[half:, :half]) @ first
    return result


def shrunk(scatter: Tensor, freedom: float) -> Tensor:
    """Within-class covariance (d, d) from the scatter and its degrees of freedom, shrunk to its diagonal.

    ``Sigma = Sigma0 + l diag(Sigma0)``, ``l = 1/2 (d / freedom)^(3/2)`` in [1e-4, 10]: many images leave the
    covariance as it is, few leave its diagonal alone. The exponent was fitted to the best of seven values of
    l on 18 sets of 20 to 6,000 images (``docs/residual.md``).
    """
    dim = len(scatter)
    sigma = scatter / freedom
    weight = min(max(0.5 * (dim / freedom) ** 1.5, 1e-4), 10.0)
    spread = sigma.diagonal()
    spread = spread.clamp(min=max(1e-3 * float(spread.mean()), 1e-4))  # a dead feature has no variance at all
    return sigma + torch.diag(weight * spread)
