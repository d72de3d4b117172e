"""How features move in a task, estimated on the task's own images: maps (after SLDC) and shifts of points."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.lora import kaiming


class Linear(nn.Module):
    """``x M``.

    Args:
        matrix: M (d, d).
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y: Tensor = x @ self.matrix
        return y


class WeaklyNonlinear(nn.Module):
    """``|x| h(x / |x|)``, ``h(u) = p_0 u + p_1 u L + p_2 (relu(u V + v) W + w)``, ``p = softmax(mix)``.

    Args:
        dim: d.
        generator: draws V and W; L starts as the identity.
    """

    def __init__(self, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        self.linear = nn.Parameter(torch.eye(dim))
        self.inner, self.outer = (nn.Parameter(kaiming(dim, dim, generator)) for _ in range(2))
        self.inner_bias, self.outer_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def unit(self, u: Tensor) -> Tensor:
        """H on unit vectors: (..., d) -> (..., d)."""
        p = self.mix.softmax(0)
        hidden = (u @ self.inner + self.inner_bias).relu()
        return p[0] * u + p[1] * (u @ self.linear) + p[2] * (hidden @ self.outer + self.outer_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        norm = x.norm(dim=-1, keepdim=True)
        y: Tensor = norm * self.unit(x / norm.clamp(min=1e-12))
        return y


def linear_map(before: Tensor, after: Tensor, alpha: float) -> Linear:
    """``M = (1 - w) (X^T X + 1e-4 I)^-1 X^T Y + w I``, ``w = exp(-n / (alpha d))``.

    Args:
        before: features (n, d); X are these at unit length.
        after: features (n, d); Y are these at unit length.
        alpha: how many images a dimension the least-squares map needs to be believed; at 0 it always is.
    """
    x, y = F.normalize(before.cpu().double()), F.normalize(after.cpu().double())
    n, dim = x.shape
    eye = torch.eye(dim, dtype=x.dtype)
    w = math.exp(-n / (alpha * dim)) if alpha else 0.0
    matrix = (1 - w) * torch.linalg.solve(x.T @ x + 1e-4 * eye, x.T @ y) + w * eye
    return Linear(matrix.float().to(before.device))


def ridge_map(before: Tensor, after: Tensor) -> Tensor:
    """``M = I + (X^T X + l I)^-1 X^T (Y - X)``, ``l = 0.01 tr(X^T X) / d`` (d, d), fp64, on the CPU.

    A feature that does not move stays exactly as it is.

    Args:
        before: X (n, d).
        after: Y (n, d).
    """
    x, y = before.cpu().double(), after.cpu().double()
    gram = x.T @ x
    eye = torch.eye(len(gram), dtype=gram.dtype)
    ridge = 0.01 * float(gram.trace()) / max(len(gram), 1)
    moved: Tensor = torch.linalg.solve(gram + ridge * eye, x.T @ (y - x))
    return eye + moved


@torch.enable_grad()
def weakly_nonlinear_map(
    before: Tensor, after: Tensor, steps: int, generator: torch.Generator, penalty: float = 0.0
) -> WeaklyNonlinear:
    """Adam on ``mean (h(x) - y)^2 + penalty p_2^2``, x and y at unit length.

    Args:
        before: features (n, d).
        after: features (n, d).
        steps: of 32 images each; the learning rate goes from 1e-3 to 5e-4.
        generator: draws the MLP and the batches.
        penalty: on the share of the MLP. The mean over d entries of unit vectors is so small that any
            noticeable penalty decides the mixture p alone.
    """
    x, y = F.normalize(before), F.normalize(after)
    found = WeaklyNonlinear(x.shape[1], generator).to(x.device)
    adam = torch.optim.Adam(found.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1), eta_min=5e-4)
    for _ in range(steps):
        some = torch.randint(len(x), (32,), generator=generator).to(x.device)
        adam.zero_grad()
        loss = F.mse_loss(found.unit(x[some]), y[some]) + penalty * found.mix.softmax(0)[2].square()
        loss.backward()
        adam.step()
        schedule.step()
    return found.requires_grad_(False)


def semantic_shift(before: Tensor, after: Tensor, points: Tensor, width: int, sigma: float) -> Tensor:
    """Where points of feature space move, from how images near them did (R, d), fp64, on the CPU.

    ``sum_i w_i (y_i - x_i)``, ``w_i`` in proportion to ``exp(-|x_i - p|^2 / (2 sigma^2)) + 1e-5``. Far from
    all images every one of them counts alike. "Semantic Drift Compensation for Class-Incremental Learning"
    (CVPR 2020, arXiv 2004.00440), with the floor of SSIAT's released code.

    Args:
        before: features x of the task's images before training (n, d).
        after: their features y after it (n, d).
        points: p (R, d).
        width: the first so many columns decide about distances.
        sigma: how far an image speaks for its surroundings.
    """
    x, y, p = (t.cpu().double() for t in (before, after, points))
    distance = torch.cdist(p[:, :width], x[:, :width])
    weight = (-distance.square() / (2 * sigma**2)).exp() + 1e-5
    shift: Tensor = weight / weight.sum(1, keepdim=True) @ (y - x)
    return shift


def associative_drift(
    before: Tensor, after: Tensor, points: Tensor, width: int, temperature: float, nearest: int
) -> Tensor:
    """How points of feature space move, read from a memory of how images did (n, d), after HopDC.

    ``sum_i w_i (y_i - x_i)``, ``w = softmax(cos(p, x_i) / temperature)`` over the ``nearest`` images: one
    retrieval step of a modern Hopfield network.

    Args:
        before: features x of the task's images before training (N, d).
        after: their features y after it (N, d).
        points: p (n, ``width``).
        width: the first so many columns of x decide about likeness.
        temperature: of the softmax.
        nearest: images that a point follows, at most all.
    """
    alike = F.normalize(points) @ F.normalize(before[:, :width]).T / temperature
    best, which = alike.topk(min(nearest, len(before)), dim=1)
    weight = torch.zeros_like(alike).scatter(1, which, best.softmax(1))
    return weight @ (after - before)
