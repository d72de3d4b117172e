"""Puts adapters around the fused qkv projections of a backbone, and takes them away again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from duallora.backbones.backbone import Backbone

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
