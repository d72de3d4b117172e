"""Prompts reach the frozen backbone here: as extra keys and values of an attention, or as extra tokens.

Both act only inside a ``with`` block; outside of it the backbone computes as if nothing had been put there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.inject import wrap_attention
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError

Prefix = tuple[Tensor, Tensor]  # keys and values (B, L, d), already in the space of projected tokens


class PrefixQKV(nn.Module):
    """A frozen qkv projection whose attention sees L more keys and values while a prefix is set.

    The attention runs on N + L tokens: it projects the N real ones, the others are ``(0, p_k, p_v)`` and
    what the attention gives for them is cut off. So attention itself is not written again; where it
    normalises its keys, those of the prefix are normalised with them.

    Args:
        base: the projection, ``d -> 3 d`` in the order q, k, v.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.prefix: Prefix | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d); with a prefix the last L of the N + L tokens are its own."""
        if self.prefix is None:
            return self.base(x)  # type: ignore[no-any-return]
        keys, values = self.prefix
        real = self.base(x[:, : -keys.shape[1]])
        extra = torch.cat([torch.zeros_like(keys), keys, values], -1)
        return torch.cat([real, extra.to(real.dtype)], 1)

    def lengthen(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the attention: appends the L tokens."""
        x, *rest = args
        return args if self.prefix is None else (F.pad(x, (0, 0, 0, self.prefix[0].shape[1])), *rest)

    def shorten(self, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
        """After the attention: cuts them off."""
        return y if self.prefix is None else y[:, : -self.prefix[0].shape[1]]


def put_prefixes(backbone: Backbone, layers: Sequence[int]) -> dict[int, PrefixQKV]:
    """Makes the attention of each layer ready for prefixes; returns the wrapped projections by layer.

    Raises:
        DualLoRAError: the backbone's attention knows the places of its own tokens only.
    """
    _check_places(backbone)
    wrappers = wrap_attention(backbone, layers, PrefixQKV)
    for layer, wrapper in wrappers.items():
        backbone.attention(layer).register_forward_pre_hook(wrapper.lengthen)
        backbone.attention(layer).register_forward_hook(wrapper.shorten)
    return wrappers


@contextmanager
def prefixed(wrappers: Mapping[int, PrefixQKV], prefixes: Mapping[int, Prefix]) -> Iterator[None]:
    """Inside, the layers of ``prefixes`` attend to them; lengths are above 0."""
    for layer, prefix in prefixes.items():
        wrappers[layer].prefix = prefix
    try:
        yield
    finally:
        for layer in prefixes:
            wrappers[layer].prefix = None


class ExtraTokens:
    """More tokens at the input of the first block; the backbone's own pooling never sees them.

    Args:
        backbone: its first and last block are hooked.

    Raises:
        DualLoRAError: the backbone's attention knows the places of its own tokens only.
    """

    def __init__(self, backbone: Backbone) -> None:
        _check_places(backbone)
        self.backbone = backbone
        self._given: Tensor | None = None
        self._outputs: list[Tensor] = []
        blocks = list(backbone.model.blocks.children())
        blocks[0].register_forward_pre_hook(self._append)
        blocks[-1].register_forward_hook(self._cut)
        if backbone.early < backbone.depth:
            blocks[backbone.early].get_submodule("norm1").register_forward_pre_hook(self._hide)

    def feature(self, images: Tensor, tokens: Tensor) -> Tensor:
        """One pass of the backbone with more tokens.

        Args:
            images: (B, 3, H, W).
            tokens: (B, L, d), after position embeddings.

        Returns:
            As the backbone (B, row_dim), but for the final feature: the mean of the tokens' outputs after the
            backbone's final norms.
        """
        self._given = tokens
        try:
            rest = self.backbone(images)[:, self.backbone.feature_dim :]
            model = self.backbone.model
            # Where the final norm stands after the pooling, it does so here.
            feature: Tensor = model.fc_norm(model.norm(self._outputs.pop()).mean(1))
            return torch.cat([feature, rest], 1)
        finally:
            self._given = None
            self._outputs.clear()

    def _append(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return args if self._given is None else (torch.cat([x, self._given.to(x.dtype)], 1), *rest)

    def _cut(self, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
        if self._given is None:
            return y
        length = self._given.shape[1]
        self._outputs.append(y[:, -length:])
        return y[:, :-length]

    def _hide(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """After the last block the backbone normalises the tokens of an early layer again, to read them."""
        x, *rest = args
        return (x[:, : -self._outputs[-1].shape[1]], *rest) if self._outputs else args


def _check_places(backbone: Backbone) -> None:
    if backbone.positions != "absolute":
        raise DualLoRAError(
            f"the backbone {backbone.info.name} has {backbone.positions} positions, among which prompts have "
            "no place; take a method without prompts, such as lora or duallora, or a backbone such as "
            "vit_base_patch16_224.augreg_in21k."
        )


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Prompts drawn from U(-1, 1)."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator)


def small(*shape: int, generator: torch.Generator) -> Tensor:
    """Keys drawn from U(-.01, .01).

    Cosines see only the direction of a key, and Adam's steps do not grow with it: a small key turns to its
    task within a few steps, where one of unit size would hardly turn in a short task.
    """
    return 0.01 * uniform(*shape, generator=generator)


def halves(prompt: Tensor) -> Prefix:
    """A prompt (B, L, d) as keys (its first half) and values."""
    keys, values = prompt.chunk(2, 1)
    return keys, values
