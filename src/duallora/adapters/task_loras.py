"""LoRA pairs that add up, one a task: the earlier ones stay frozen and active beside the one in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from duallora.adapters.lora import kaiming


class Pairs(nn.Module):
    """``x sum_i a_i A_i B_i`` for each of P projections, which share no factor.

    Args:
        dim: d.
        out: columns written, ``P d_out``.
        projections: P.
        scales: gives the ``a_i`` (one scalar tensor a task); None where all are 1.
    """

    def __init__(
        self, dim: int, out: int, projections: int, scales: Callable[[], Sequence[Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.dim, self.projections, self.width = dim, projections, out // projections
        self.scales = scales
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(dim, 1), persistent=False)
        self.a = nn.ParameterList()  # A_i (P x d x r_i)
        self.b = nn.ParameterList()  # B_i (P x r_i x d_out)

    def open(self, rank: int, generator: torch.Generator, device: torch.device) -> None:
        """Adds a task's pair, A as LoRA draws it and B zero, and freezes the earlier ones."""
        self.requires_grad_(False)
        drawn = [kaiming(self.dim, rank, generator) for _ in range(self.projections)]
        self.a.append(nn.Parameter(torch.stack(drawn).to(device)))
        self.b.append(nn.Parameter(torch.zeros(self.projections, rank, self.width, device=device)))

    def sizes(self, task: int) -> Tensor:
        """``|A_i|_F |B_i|_F`` (P,), not below ``|A_i B_i|_F``; 0 where B is still zero."""
        sizes: Tensor = self.a[task].norm(dim=(1, 2)) * self.b[task].norm(dim=(1, 2))
        return sizes

    def delta_weight(self) -> Tensor:
        """``sum_i a_i A_i B_i`` of all projections side by side (d x out); 0 before the first task."""
        if not self.a:
            return self.zero.expand(-1, self.projections * self.width)
        left = list(self.a)
        if self.scales is not None:
            left = [scale * a for scale, a in zip(self.scales(), left, strict=True)]
        product = torch.cat(left, 2) @ torch.cat(list(self.b), 1)  # P x d x d_out
        return torch.cat(product.unbind(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out); as one matrix, whose cost per token does not grow with the tasks."""
        y: Tensor = x @ self.delta_weight()
        return y
