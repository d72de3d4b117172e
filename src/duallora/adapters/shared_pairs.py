"""LoRA pairs of CL-LoRA: one for all tasks whose down-projection never changes, or a weighted one a task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duallora.adapters.per_pass import PerPass


class SharedPairs(nn.Module):
    """``x A_p B_p`` for each of P projections; ``A_p`` is orthonormal and stays as it was drawn.

    Args:
        dim: d.
        out: columns written, ``P d_out``.
        projections: P.
        rank: r, at most d.
        generator: draws A (P x d x r); B (P x r x d_out) is zero.
        reweighting: factors of the gradient of B by column, of all shared pairs by id, held around a pass.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        projections: int,
        rank: int,
        generator: torch.Generator,
        reweighting: PerPass[bool],
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(orthonormal(projections, dim, rank, generator), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(projections, self.a.shape[2], out // projections))
        self.reweighting = reweighting
        self.weights: Tensor | None = None  # of the gradient, one a column of B (P x 1 x d_out)

    @torch.no_grad()
    def weigh(self) -> None:
        """Takes the columns of B as they are now for :attr:`weights`: ``d_out |b_j| / sum |b_j|``."""
        norms = self.b.norm(dim=1, keepdim=True)
        self.weights = norms / norms.mean(2, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)

    def delta_weight(self) -> Tensor:
        """``A B`` of all projections side by side (d x out)."""
        b: Tensor = self.b
        if self.reweighting.get() and self.weights is not None:
            b = b.detach() + self.weights * (b - b.detach())  # the same value, another gradient
        return torch.cat((self.a @ b).unbind(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out)."""
        y: Tensor = x @ self.delta_weight()
        return y


class TaskPairs(nn.Module):
    """``w_p x A_p B_p`` for each of P projections, with a pair and weights of its own for every task.

    Args:
        dim: d.
        out: columns written, ``P d_out``.
        projections: P.
        acting: the task whose pair acts in a pass; (B,) one for each image; None for none.
    """

    def __init__(self, dim: int, out: int, projections: int, acting: PerPass[int | Tensor]) -> None:
        super().__init__()
        self.dim, self.projections, self.width, self.acting = dim, projections, out // projections, acting
        self.a = nn.ParameterList()  # (P x d x r)
        self.b = nn.ParameterList()  # (P x r x d_out)
        self.weights = nn.ParameterList()  # (P,)

    def open(self, rank: int, generator: torch.Generator, device: torch.device) -> None:
        """Adds a task's pair, A orthonormal and B zero, with weights in [0.5, 1.5]; freezes the others."""
        self.requires_grad_(False)
        a = orthonormal(self.projections, self.dim, rank, generator)
        weights = torch.empty(self.projections).uniform_(0.5, 1.5, generator=generator)
        self.a.append(nn.Parameter(a.to(device)))
        self.b.append(nn.Parameter(torch.zeros(self.projections, a.shape[2], self.width, device=device)))
        self.weights.append(nn.Parameter(weights.to(device)))

    @torch.no_grad()
    def clear(self, task: int) -> None:
        """Sets all of a task's own to zero."""
        for parameter in (self.a[task], self.b[task], self.weights[task]):
            parameter.zero_()

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, N, d) -> (B, N, out)."""
        acting = self.acting.get()
        if acting is None:
            return None
        if isinstance(acting, int):
            product = self.weights[acting][:, None, None] * (self.a[acting] @ self.b[acting])
            one: Tensor = x @ torch.cat(product.unbind(), 1)
            return one
        a, b = (torch.stack(list(each))[acting] for each in (self.a, self.b))  # (B, P, d, r) and back
        w = torch.stack(list(self.weights))[acting][:, :, None, None]
        y: Tensor = w * (x[:, None] @ a @ b)  # (B, P, N, d_out)
        return y.transpose(1, 2).flatten(2)


def orthonormal(projections: int, dim: int, rank: int, generator: torch.Generator) -> Tensor:
    """Q of a QR decomposition (P x d x min(r, d)) of entries drawn uniformly from [0, 1)."""
    drawn = torch.rand(projections, dim, rank, generator=generator)
    q: Tensor = torch.linalg.qr(drawn)[0]
    return q
