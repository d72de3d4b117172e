"""A Gaussian per row with a covariance of its own, and heads refitted on what is drawn from it.

Every refit starts from the heads as their training left them, not from what the last refit made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from duallora.classifiers.class_statistics import ByRow
from duallora.classifiers.heads import Heads


class Gaussians(ByRow):
    """Mean (R, d), covariance (R, d, d) and trained head of every row, fp32 on the CPU.

    That takes ``4 (d + 1)^2`` bytes a row.

    Args:
        dim: d, width of the features.
        heads: whether trained heads are kept; without, refits go on from one another.

    Attributes:
        weight: of the heads as their training left them (R, d), None where they are not kept; a model saved
            by an early version lacks them.
        bias: likewise (R,).
    """

    optional: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})

    def __init__(self, dim: int, *, heads: bool = True) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(0, dim))
        self.covariance: Tensor
        self.register_buffer("covariance", torch.zeros(0, dim, dim))
        self._with_heads = heads
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(0, dim) if heads else None)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(0) if heads else None)

    def keep(self, head: nn.Module) -> None:
        """Keeps the head that training left the rows of a task."""
        weight, bias = (head.get_parameter(name).detach().float().cpu() for name in ("weight", "bias"))
        self.weight, self.bias = torch.cat([self.weight, weight]), torch.cat([self.bias, bias])

    def complete(self, heads: Heads) -> None:
        """After a load: where a model lacks its trained heads, the aligned ones stand for them."""
        if not isinstance(self._buffers["weight"], Tensor):
            self.weight, self.bias = (
                torch.cat([h.get_parameter(name).detach().float().cpu() for h in heads.tasks])
                for name in ("weight", "bias")
            )

    @torch.no_grad()
    def restore(self, heads: Heads) -> None:
        """Puts all heads back to what their training left."""
        write(heads, self.weight, self.bias)

    def add(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Adds the rows of a task from its features (n, d) and labels (n,); one image has covariance 0."""
        x, labels = features.cpu().double(), labels.cpu()
        for c in range(classes):
            own = x[labels == c]
            centred = own - own.mean(0)
            covariance = centred.T @ centred / max(len(own) - 1, 1)
            self.mean = torch.cat([self.mean, own.mean(0, keepdim=True).float()])
            self.covariance = torch.cat([self.covariance, covariance[None].float()])

    def simulate(self, rows: int) -> None:
        """So many rows around zero, for measurements."""
        dim = self.mean.shape[1]
        self.mean, self.covariance = torch.zeros(rows, dim), torch.eye(dim).repeat(rows, 1, 1)
        if self._with_heads:
            self.weight, self.bias = torch.zeros(rows, dim), torch.zeros(rows)

    def forget(self, kept: Tensor) -> None:
        """Loses rows; ``kept`` (R,), bool, says which stay."""
        self.mean, self.covariance = self.mean[kept], self.covariance[kept]
        if self._with_heads:
            self.weight, self.bias = self.weight[kept], self.bias[kept]

    def move(self, mean: Tensor, jacobian: Tensor) -> None:
        """Rows now lie at ``mean`` (R, d) with covariances ``J S J^T``, J = dy/dx (R, d, d) or (d, d)."""
        j = jacobian.cpu().double()
        moved = j @ self.covariance.double() @ j.mT
        self.mean, self.covariance = mean.cpu().float(), ((moved + moved.mT) / 2).float()

    def factors(self, ridge: float) -> Tensor:
        """Lower Cholesky factors (R, d, d) of the covariances with a ridge.

        The ridge is at least 1e-5 of a row's largest variance: the error of fp32 must not make it indefinite.
        """
        covariance = self.covariance.double()
        least = 1e-5 * covariance.diagonal(dim1=1, dim2=2).amax(1)
        eye = torch.eye(covariance.shape[1], dtype=torch.float64)
        factors: Tensor = torch.linalg.cholesky(covariance + least.clamp(min=ridge)[:, None, None] * eye)
        return factors.float()


def aged(mean: Tensor, row_task: Tensor, latest: int) -> Tensor:
    """Means (R, d) drawn nearer to zero the older they are, by up to a tenth, as SLCA has it.

    Args:
        mean: of the rows (R, d).
        row_task: their tasks (R,).
        latest: the task whose means stay as they are.
    """
    age = (row_task + 1) / (latest + 1)
    return mean * (0.9 + 0.1 * age)[:, None]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x weight^T + bias`` (n, R)."""
    return x @ weight.T + bias


@torch.enable_grad()
def refit(
    heads: Heads,
    mean: Tensor,
    factors: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    samples: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    end: float = 0.0,
    logits: Callable[[Tensor, Tensor, Tensor], Tensor] = affine,
) -> None:
    """Trains all heads together on features drawn from Gaussians, from where they are.

    Every epoch draws anew; every batch holds equally many samples of every row. The learning rate follows a
    cosine.

    Args:
        heads: changed in place.
        mean: of the rows (R, d).
        factors: Cholesky factors of their covariances (R, d, d).
        loss: of logits (n, R) and rows (n,).
        optimizer: of weight (R, d) and bias (R,).
        samples: a row and epoch.
        epochs: over the samples.
        batch_size: samples of all rows in a step, rounded down to equal shares; at least one a row.
        generator: draws the samples.
        end: the share of the learning rate that the cosine ends at.
        logits: of features (n, d), weight and bias.
    """
    device, rows = heads.device, len(mean)
    each = min(max(batch_size // rows, 1), samples)
    parameters = [torch.cat([getattr(h, name).detach() for h in heads.tasks]) for name in ("weight", "bias")]
    weight, bias = (p.requires_grad_() for p in parameters)
    steps = epochs * (samples // each)
    steepest = optimizer([weight, bias])
    last = end * steepest.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steepest, T_max=max(steps, 1), eta_min=last)
    target = torch.arange(rows, device=device).repeat_interleave(each)
    for _ in range(epochs):
        noise = torch.randn(rows, samples, mean.shape[1], generator=generator).to(device)
        drawn = mean.to(device)[:, None] + noise @ factors.to(device).mT
        for start in range(0, samples - each + 1, each):
            x = drawn[:, start : start + each].flatten(0, 1)
            steepest.zero_grad()
            loss(logits(x, weight, bias), target).backward()
            steepest.step()
            schedule.step()
    with torch.no_grad():
        write(heads, weight, bias)


def write(heads: Heads, weight: Tensor, bias: Tensor) -> None:
    """Writes weight (R, d) and bias (R,) of all rows into the heads of the tasks."""
    sizes = [len(h.bias) for h in heads.tasks]  # type: ignore[arg-type]
    for head, w, b in zip(heads.tasks, weight.split(sizes), bias.split(sizes), strict=True):
        head.weight.copy_(w)  # type: ignore[operator]
        head.bias.copy_(b)  # type: ignore[operator]
