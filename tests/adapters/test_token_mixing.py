"""Tokens of two images, mixed as they enter a block."""

from __future__ import annotations

import threading

import torch
from small_tasks import tiny_backbone, tiny_images
from torch import Tensor

from duallora.adapters.token_mixing import TokenMixing

LAYER = 1


def entering(images: Tensor, mixing: TokenMixing, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens in front of the block, and those that it is given."""
    found: list[Tensor] = []
    block = BACKBONE.block(LAYER)
    before = BACKBONE.block(LAYER - 1).register_forward_hook(lambda m, args, out: found.append(out))
    within = block.get_submodule("norm1").register_forward_pre_hook(lambda m, args: found.append(args[0]))
    try:
        if shares is None:
            BACKBONE(images)
        else:
            with mixing.mixing(shares):
                BACKBONE(images)
    finally:
        before.remove()
        within.remove()
    return found[0], found[1]


BACKBONE = tiny_backbone(depth=3)


def test_the_first_half_is_as_it_was_and_the_second_a_weighted_mean():
    images, shares = tiny_images(6), torch.tensor([0.4, 0.5, 0.6])
    below, given = entering(images, TokenMixing(BACKBONE, LAYER), shares)
    own, partners = below.chunk(2)
    assert torch.equal(given[:3], own)
    wanted = shares[:, None, None] * own + (1 - shares[:, None, None]) * partners
    assert torch.allclose(given[3:], wanted, atol=1e-6)


def test_outside_passes_are_as_they_were():
    mixing, images = TokenMixing(BACKBONE, LAYER), tiny_images(4)
    plain = BACKBONE(images)
    with mixing.mixing(torch.full((2,), 0.5)):
        mixed = BACKBONE(images)
    assert torch.equal(mixed[:2], plain[:2]) and not torch.allclose(mixed[2:], plain[2:])
    assert torch.equal(BACKBONE(images), plain)
    below, given = entering(images, mixing, None)
    assert torch.equal(below, given)


def test_passes_of_other_threads_are_as_they_were():
    mixing, images, found = TokenMixing(BACKBONE, LAYER), tiny_images(4), []
    plain = BACKBONE(images)
    with mixing.mixing(torch.full((2,), 0.5)):
        other = threading.Thread(target=lambda: found.append(BACKBONE(images)))
        other.start()
        other.join()
    assert torch.equal(found[0], plain)


def test_a_batch_in_pieces_is_mixed_alike():
    mixing, images, shares = TokenMixing(BACKBONE, LAYER), tiny_images(8), torch.linspace(0.4, 0.6, 4)
    own, partners = images.chunk(2)

    def mixed(which: slice) -> Tensor:
        with mixing.mixing(shares[which]):
            return BACKBONE(torch.cat([own[which], partners[which]])).chunk(2)[1]

    whole = mixed(slice(0, 4))
    assert torch.allclose(whole, torch.cat([mixed(slice(0, 3)), mixed(slice(3, 4))]), atol=1e-5)
