"""Mixes the tokens of images as they enter a block, so that what is above it sees what is in neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from duallora.adapters.per_pass import PerPass
from duallora.backbones.backbone import Backbone
from duallora.backbones.compiling import uncompiled


class TokenMixing:
    """The mean of two images' tokens in place of one's, at the entrance of a block.

    ::

        images        x_1 .. x_n  p_1 .. p_n            2 n of them, (2 n, 3, H, W)
                           | blocks below
        tokens        x_1 .. x_n  s x_1 + (1 - s) p_1 ..
                           | this block, and those above

    Frozen blocks below see whole images alone. Mixed as pixels they would show them what no photo is, and
    features learned from it carry over to other classes less (docs/adapters.md).

    Args:
        backbone: whose block it is.
        layer: of the block.
    """

    def __init__(self, backbone: Backbone, layer: int) -> None:
        self._block: nn.Module = backbone.block(layer)
        self._shares: PerPass[Tensor] = PerPass()

    @contextmanager
    def mixing(self, shares: Tensor) -> Iterator[None]:
        """Inside, passes of this thread over 2 n images mix the last n with the first.

        Args:
            shares: s, of the first n (n,).
        """
        hook = self._block.register_forward_pre_hook(self._mixed)
        try:
            with uncompiled(), self._shares.holding(shares):
                yield
        finally:
            hook.remove()

    def _mixed(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        shares = self._shares.get()
        if shares is None:  # a pass of another thread
            return None
        own, partners = inputs[0].chunk(2)
        mixed = torch.lerp(partners, own, shares[:, None, None].to(own.dtype))
        return (torch.cat([own, mixed]), *inputs[1:])
