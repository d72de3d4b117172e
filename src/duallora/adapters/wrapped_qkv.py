"""Modules in the place of a frozen fused qkv projection: how they get there, and what all of them do.

A wrapper computes ``y = x W + updates``. What is a matrix is merged into the weight W, and costs nothing
then; what is not is added to the columns of the projections that it updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WrappedQKV(nn.Module):
    """A fused qkv ``nn.Linear`` with updates beside it; the wrapped weight itself is never changed.

    Args:
        base: the frozen projection, ``d -> 3 d_out`` in the order q, k, v.
        groups: what is updated together, each a string over ``q``, ``k``, ``v``.

    Attributes:
        effective: ``W_0`` with the merged updates, cast once after each merge; None without any.
    """

    def __init__(self, base: nn.Linear, groups: Sequence[str]) -> None:
        super().__init__()
        self.base = base
        self.dim, self.width = base.in_features, base.out_features // 3
        self.effective: Tensor | None = None
        self._written = {group: _adjacent(self.slices(group)) for group in groups}

    @property
    def weight(self) -> Tensor:
        """Effective weight of the linear part (3 d_out x d), as ``nn.Linear`` stores it."""
        return self.base.weight if self.effective is None else self.effective

    @property
    def bias(self) -> Tensor | None:
        """Bias of the wrapped projection."""
        return self.base.bias

    def slices(self, group: str) -> list[slice]:
        """Output columns of each projection in a group."""
        return [slice("qkv".index(p) * self.width, ("qkv".index(p) + 1) * self.width) for p in group]

    def frozen_weight(self, group: str) -> Tensor:
        """``W_0`` of a group's projections (d x out)."""
        return torch.cat([self.base.weight.detach()[s] for s in self.slices(group)], 0).T

    def merge_updates(self, updates: Mapping[str, Tensor | None]) -> None:
        """From now on computes with ``W_0 + dW``; without any update with ``W_0`` itself.

        Args:
            updates: by group the sum of all its updates (d x out), or None.
        """
        if all(update is None for update in updates.values()):
            self.effective = None
            return
        weight = self.base.weight.detach().float().clone()
        for group, update in updates.items():
            if update is not None:
                for columns, part in zip(self.slices(group), update.split(self.width, 1), strict=True):
                    weight[columns] += part.T
        self.effective = weight.to(self.base.weight.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """``x W`` (B, N, 3 d_out) for x (B, N, d)."""
        return F.linear(x, self.weight, self.base.bias)

    def add(self, y: Tensor, group: str, update: Tensor) -> None:
        """Adds an update (B, N, out) to the columns of a group in y (B, N, 3 d_out).

        In place: y is fresh from a product and no gradient needs its old value.
        """
        start = 0
        for columns in self._written[group]:
            width = columns.stop - columns.start
            y[..., columns].add_(update[..., start : start + width])
            start += width

    def add_product(self, y: Tensor, group: str, h: Tensor, c: Tensor) -> None:
        """Adds ``h c`` (B, N, out) to the columns of a group in y (B, N, 3 d_out), in place as :meth:`add`.

        The product goes where it belongs, without a tensor of its own.

        Args:
            y: what is added to, contiguous.
            group: whose columns.
            h: (B, N, K).
            c: (K, out), or for each image (B, K, out).
        """
        h, start = h.to(y.dtype), 0
        for columns in self._written[group]:
            width = columns.stop - columns.start
            part = c[..., start : start + width].to(y.dtype)  # autocast leaves products in place alone
            if c.dim() == 2:
                y.view(-1, y.shape[2])[:, columns].addmm_(h.reshape(-1, h.shape[2]), part)
            else:
                y[..., columns].baddbmm_(h, part)
            start += width


def _adjacent(slices: Sequence[slice]) -> list[slice]:
    """The same columns in as few pieces as their order allows: k and v are one piece."""
    joined: list[slice] = []
    for each in slices:
        if joined and joined[-1].stop == each.start:
            joined[-1] = slice(joined[-1].start, each.stop)
        else:
            joined.append(each)
    return joined


def adapted_layers(backbone: Backbone, first: int | None) -> list[int]:
    """Layers that carry adapters: from ``first`` (default ``max(1, depth // 3)``) to the top.

    Raises:
        DualLoRAError: if no layer is left.
    """
    start = max(1, backbone.depth // 3) if first is None else first
    if not start < backbone.depth:
        raise DualLoRAError(
            f"first_adapted_layer must be below {backbone.depth}, the backbone's depth, not {start}."
        )
    return list(range(start, backbone.depth))


def wrap_attention(
    backbone: Backbone, layers: Sequence[int], make: Callable[[nn.Linear], ModuleT]
) -> dict[int, ModuleT]:
    """Replaces the qkv projection of each layer by ``make(qkv)``.

    Args:
        backbone: its attention modules call ``qkv`` as a layer, which :class:`Backbone` has checked.
        layers: indices of blocks, 0 to ``depth - 1``.
        make: builds the wrapper of a frozen projection ``d -> 3 d_out`` in the order q, k, v.

    Returns:
        The wrappers by layer, in evaluation mode as the whole backbone.

    Raises:
        ValueError: a layer that the backbone does not have or that is wrapped already; nothing has changed.
    """
    plain: dict[int, nn.Linear] = {}
    for layer in layers:
        if not 0 <= layer < backbone.depth:
            raise ValueError(f"layer {layer} of a backbone with {backbone.depth} layers")
        qkv = backbone.attention(layer).get_submodule("qkv")
        if layer in backbone.plain_qkv or not isinstance(qkv, nn.Linear):
            raise ValueError(f"layer {layer} is wrapped already")
        plain[layer] = qkv
    wrappers = {layer: make(qkv).eval() for layer, qkv in plain.items()}
    for layer, wrapper in wrappers.items():
        backbone.attention(layer).qkv = wrapper
    backbone.plain_qkv.update(plain)
    return wrappers


def unwrap_attention(backbone: Backbone) -> None:
    """Puts every original qkv projection back; a backbone that is not wrapped stays as it is."""
    for layer, qkv in backbone.plain_qkv.items():
        backbone.attention(layer).qkv = qkv
    backbone.plain_qkv.clear()
