"""An update of any form beside a fused qkv projection: what the methods other than DualLoRA put there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from duallora.adapters.wrapped_qkv import WrappedQKV, wrap_attention
from duallora.backbones.backbone import Backbone


class Beside(WrappedQKV):
    """``y = x W_0 + update(x)`` in the columns of some projections.

    Args:
        base: the frozen projection, ``d -> 3 d_out`` in the order q, k, v.
        projections: which of ``q``, ``k`` and ``v`` are updated, for instance ``"kv"``.
        update: maps (B, N, d) to (B, N, ``len(projections)`` d_out), or to None where it adds nothing.
    """

    def __init__(self, base: nn.Linear, projections: str, update: nn.Module) -> None:
        super().__init__(base, [projections])
        self.projections, self.update = projections, update

    @torch.no_grad()
    def delta_weight(self) -> Tensor | None:
        """The update as a matrix (d x columns), if it is one."""
        if not hasattr(self.update, "delta_weight"):
            return None
        delta: Tensor = self.update.delta_weight()  # type: ignore[operator]
        return delta.detach().clone()

    def frozen_norm(self) -> float:
        """Frobenius norm of ``W_0`` in the columns that are updated."""
        return float(self.frozen_weight(self.projections).T.norm())

    def merge(self) -> None:
        """From now on computes with ``W_0 + delta``, if the update is a matrix."""
        delta = self.delta_weight()
        if delta is not None:
            self.merge_updates({self.projections: delta})

    def separate(self) -> None:
        """From now on computes the update apart, so that it can be trained."""
        self.effective = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d_out)."""
        y = self.linear(x)
        update = self.update(x) if self.effective is None else None
        if update is not None:
            self.add(y, self.projections, update)
        return y


def put_beside(
    backbone: Backbone,
    layers: Sequence[int],
    projections: str,
    make: Callable[[int, int], nn.Module],
) -> dict[int, Beside]:
    """Puts an update beside the qkv projection of each layer.

    Args:
        backbone: whose projections are wrapped.
        layers: indices of blocks.
        projections: which of ``q``, ``k`` and ``v``.
        make: (d, columns written) -> the update of one layer; called in the order of the layers.

    Returns:
        The wrapped projections by layer.
    """
    device = next(backbone.parameters()).device

    def wrap(qkv: nn.Linear) -> Beside:
        out = len(projections) * qkv.out_features // 3
        return Beside(qkv, projections, make(qkv.in_features, out).to(device))

    return wrap_attention(backbone, layers, wrap)


class LowRank(nn.Module):
    """LoRA: ``(x A) B`` with A (d x r) drawn as a linear layer's weight and B (r x out) zero.

    Args:
        dim: d.
        out: columns written.
        rank: r.
        generator: draws A.
    """

    def __init__(self, dim: int, out: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(kaiming(dim, rank, generator))
        self.b = nn.Parameter(torch.zeros(rank, out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out)."""
        return (x @ self.a) @ self.b

    def delta_weight(self) -> Tensor:
        """``A B`` (d x out)."""
        return self.a @ self.b


def kaiming(dim: int, rank: int, generator: torch.Generator) -> Tensor:
    """A down-projection (d x r) as LoRA draws it: uniform in Kaiming's bound for fan-in d, a = sqrt(5)."""
    bound = dim**-0.5
    return torch.empty(dim, rank).uniform_(-bound, bound, generator=generator)
