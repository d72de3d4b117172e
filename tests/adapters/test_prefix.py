"""Prefixes and extra tokens against a forward pass that is written out, on every family of backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch import Tensor
from written_vit import written_feature, written_features

from duallora.adapters.prefix import ExtraTokens, halves, put_prefixes, uniform
from duallora.adapters.wrapped_qkv import unwrap_attention

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("vit", {"qk_norm": True, "norm_layer": torch.nn.LayerNorm}),
    ("vit", {"scale_attn_norm": True}),
    ("vit", {"global_pool": "avg"}),
]
kinds = pytest.mark.parametrize(
    ("family", "changes"), KINDS, ids=[" ".join([family, *changes]) for family, changes in KINDS]
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return uniform(*shape, generator=torch.Generator().manual_seed(seed))


def prefixes(*layers: int, batch: int = 3) -> dict[int, tuple[Tensor, Tensor]]:
    """Of other lengths in every layer, and other for every image."""
    return {n: halves(2 * drawn(batch, 4 + 2 * n, WIDTH, seed=n)) for n in layers}


@kinds
@pytest.mark.parametrize("fused", [True, False])
def test_a_prefix_is_more_keys_and_values(family: str, changes: dict[str, Any], fused: bool) -> None:
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    places = put_prefixes(backbone, [0, 1])
    for layer in (0, 1):
        backbone.attention(layer).fused_attn = fused
    plain = written_features(tiny_backbone(family, **changes), images)
    for layers in ((0,), (1,), (0, 1)):
        given = prefixes(*layers)
        with places.holding(given):
            found = backbone(images)
        expected = written_features(tiny_backbone(family, **changes), images, given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
        assert float((expected - plain)[:, :WIDTH].abs().max()) > 0.02, "the prefix must matter"


@kinds
def test_extra_tokens_are_more_tokens(family: str, changes: dict[str, Any]) -> None:
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    extra, tokens = ExtraTokens(backbone), drawn(3, 5, WIDTH)
    entering: list[int] = []
    backbone.model.norm.register_forward_pre_hook(lambda _, args: entering.append(args[0].shape[1]))
    found = extra.feature(images, tokens)
    assert entering == [16 + backbone.num_prefix_tokens, 5], "the backbone's pooling sees its own tokens"
    expected = written_features(tiny_backbone(family, **changes), images, tokens=tokens)
    assert found.shape == (3, backbone.row_dim)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    others = ((images, tokens.flip(-1)), (images.flip(0), tokens))
    for other in (written_feature(tiny_backbone(family, **changes), i, tokens=t) for i, t in others):
        assert float((other - expected[:, :WIDTH]).abs().max()) > 0.02, "tokens and images must matter"


@kinds
def test_without_them_the_backbone_is_the_plain_one(family: str, changes: dict[str, Any]) -> None:
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    expected = tiny_backbone(family, **changes)(images)
    places, extra = put_prefixes(backbone, [0, 1]), ExtraTokens(backbone)
    assert torch.equal(backbone(images), expected)
    with places.holding(prefixes(0, 1)):
        assert not torch.allclose(backbone(images), expected, atol=1e-3)
    assert torch.equal(backbone(images), expected)
    extra.feature(images, drawn(3, 5, WIDTH))
    assert torch.equal(backbone(images), expected)
    unwrap_attention(backbone)
    assert torch.equal(backbone(images), expected)


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    backbone, images = tiny_backbone(), tiny_images()
    expected = backbone(images)
    places, extra = put_prefixes(backbone, [0, 1]), ExtraTokens(backbone)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), places.holding(prefixes(0, 1)):
        interrupt()
    # The last block has cut its tokens off by then.
    handle = backbone.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        extra.feature(images, drawn(3, 5, WIDTH))
    handle.remove()
    assert torch.equal(backbone(images), expected)
    assert extra._current.get() is None and places.get() is None


def test_gradients_of_prefixes_and_tokens_are_those_of_the_formula() -> None:
    images, prompt, tokens = tiny_images(), drawn(3, 6, WIDTH), drawn(3, 5, WIDTH)
    first, second = drawn(2, 3, WIDTH, seed=1)  # the squares of normalised features have no gradient
    backbone, other = tiny_backbone(), tiny_backbone()
    places, extra = put_prefixes(backbone, [0]), ExtraTokens(other)

    def by_hooks(p: Tensor, t: Tensor) -> Tensor:
        with places.holding({0: halves(p)}):
            a, b = backbone(images)[:, :WIDTH], extra.feature(images, t)[:, :WIDTH]
            return (first * a).sum() + (second * b).sum()

    def by_hand(p: Tensor, t: Tensor) -> Tensor:
        a = written_feature(tiny_backbone(), images, {0: halves(p)})
        b = written_feature(tiny_backbone(), images, tokens=t)
        return (first * a).sum() + (second * b).sum()

    grads = []
    for function in (by_hooks, by_hand):
        leaves = prompt.clone().requires_grad_(), tokens.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for found, expected in zip(*grads, strict=True):
        assert float(expected.abs().max()) > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert all(p.grad is None for p in backbone.parameters())


def test_halves_are_keys_then_values() -> None:
    prompt = drawn(2, 6, WIDTH)
    keys, values = halves(prompt)
    assert torch.equal(keys, prompt[:, :3]) and torch.equal(values, prompt[:, 3:])
