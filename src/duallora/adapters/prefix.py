"""Prompts reach the frozen backbone here: as extra keys and values of an attention, or as extra tokens.

Both act only inside a ``with`` block; outside of it the backbone computes as if nothing had been put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.per_pass import PerPass
from duallora.adapters.wrapped_qkv import wrap_attention
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError

Prefix = tuple[Tensor, Tensor]  # keys and values (B, L, d), already in the space of projected tokens
Prefixes = PerPass[Mapping[int, Prefix]]  # of the pass that runs, by layer


class PrefixQKV(nn.Module):
    """A frozen qkv projection whose attention sees L more keys and values while a prefix is set.

    The attention runs on N + L tokens: it projects the N real ones, the others are ``(0, p_k, p_v)`` and
    what the attention gives for them is cut off. So attention itself is not written again; where it
    normalises its keys, those of the prefix are normalised with them.

    Args:
        base: the projection, ``d -> 3 d`` in the order q, k, v.
        layer: its place among the prefixes.
        prefixes: those of the pass that runs, by layer.
    """

    def __init__(self, base: nn.Linear, layer: int, prefixes: Prefixes) -> None:
        super().__init__()
        self.base, self.layer, self.prefixes = base, layer, prefixes

    @property
    def prefix(self) -> Prefix | None:
        """The prefix in the pass that runs."""
        given = self.prefixes.get()
        return None if given is None else given.get(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d); with a prefix the last L of the N + L tokens are its own."""
        prefix = self.prefix
        if prefix is None:
            return self.base(x)  # type: ignore[no-any-return]
        keys, values = prefix
        real = self.base(x[:, : -keys.shape[1]])
        extra = torch.cat([torch.zeros_like(keys), keys, values], -1)
        return torch.cat([real, extra.to(real.dtype)], 1)

    def lengthen(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the attention: appends the L tokens."""
        x, *rest = args
        prefix = self.prefix
        return args if prefix is None else (F.pad(x, (0, 0, 0, prefix[0].shape[1])), *rest)

    def shorten(self, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
        """After the attention: cuts them off."""
        prefix = self.prefix
        return y if prefix is None else y[:, : -prefix[0].shape[1]]


def put_prefixes(backbone: Backbone, layers: Sequence[int]) -> Prefixes:
    """Makes the attention of each layer ready for prefixes.

    Returns:
        Where the prefixes of a pass are set by layer, each longer than 0:
        ``with prefixes.holding({layer: prefix}): backbone(images)``.

    Raises:
        DualLoRAError: the backbone's attention knows the places of its own tokens only.
    """
    _check_places(backbone)
    prefixes: Prefixes = PerPass()
    places = iter(layers)
    wrappers = wrap_attention(backbone, layers, lambda qkv: PrefixQKV(qkv, next(places), prefixes))
    for layer, wrapper in wrappers.items():
        backbone.attention(layer).register_forward_pre_hook(wrapper.lengthen)
        backbone.attention(layer).register_forward_hook(wrapper.shorten)
    return prefixes


@dataclass
class _Tokens:
    """The tokens given to a pass, and what they were after the last block."""

    given: Tensor
    outputs: list[Tensor] = field(default_factory=list)


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
        self._current: PerPass[_Tokens] = PerPass()
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
        with self._current.holding(_Tokens(tokens)) as mine:
            rest = self.backbone(images)[:, self.backbone.feature_dim :]
            model = self.backbone.model
            # Where the final norm stands after the pooling, it does so here.
            feature: Tensor = model.fc_norm(model.norm(mine.outputs.pop()).mean(1))
            return torch.cat([feature, rest], 1)

    def _append(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        mine = self._current.get()
        return args if mine is None else (torch.cat([x, mine.given.to(x.dtype)], 1), *rest)

    def _cut(self, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
        mine = self._current.get()
        if mine is None:
            return y
        length = mine.given.shape[1]
        mine.outputs.append(y[:, -length:])
        return y[:, :-length]

    def _hide(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """After the last block the backbone normalises the tokens of an early layer again, to read them."""
        x, *rest = args
        mine = self._current.get()
        return args if mine is None or not mine.outputs else (x[:, : -mine.outputs[-1].shape[1]], *rest)


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
