"""Adapters beside the mlp, against hooks on timm's own blocks, on every kind of block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from tiny import FAMILIES, IMAGE, WIDTH, tiny_backbone, tiny_images
from torch import nn

from duallora.adapters.bottleneck import Bottleneck, TaskBottlenecks
from duallora.adapters.per_pass import PerPass
from duallora.adapters.wrapped_mlp import put_beside_mlp, unwrap_mlp
from duallora.backbones.backbone import Backbone
from duallora.bench.counts import flops

_SIZE = {"img_size": IMAGE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 5}


def of_kind(kind: type[nn.Module], **changes: object) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Backbone(kind(**_SIZE, **changes), tiny_backbone().info)


KINDS: dict[str, Callable[[], Backbone]] = {
    **{family: partial(tiny_backbone, family) for family in FAMILIES},
    "eva": partial(of_kind, Eva),
    "eva swiglu": partial(of_kind, Eva, init_values=0.5, swiglu_mlp=True),
    "beit": partial(of_kind, Beit, use_abs_pos_emb=True),
    "beit scaled": partial(of_kind, Beit, init_values=0.5, use_rel_pos_bias=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def moved(update: nn.Module, seed: int) -> nn.Module:
    """As training might leave it."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))
    return update


def bottleneck(dim: int) -> Bottleneck:
    return Bottleneck(dim, 6, 0.5, torch.Generator().manual_seed(0))


@kinds
@torch.no_grad()
def test_it_reads_what_enters_the_norm_and_adds_to_what_leaves_the_block(kind: str) -> None:
    images = tiny_images()
    updates = [moved(bottleneck(WIDTH), layer) for layer in range(2)]
    expected = KINDS[kind]()
    for layer, update in enumerate(updates):
        entered: list[torch.Tensor] = []
        block = expected.block(layer)
        block.norm2.register_forward_pre_hook(lambda _, args, e=entered: e.append(args[0]))
        block.register_forward_hook(lambda _, __, y, e=entered, u=update: y + u(e.pop()))
    backbone, places = KINDS[kind](), iter(updates)
    plain = backbone(images)
    put_beside_mlp(backbone, [0, 1], lambda _: next(places))
    found = backbone(images)
    torch.testing.assert_close(found, expected(images), rtol=1e-4, atol=2e-5)
    assert float((found - plain).abs().max()) > 0.02, "the adapter must matter"


@kinds
@torch.no_grad()
def test_a_new_one_changes_nothing_and_unwrapping_gives_all_back(kind: str) -> None:
    backbone, images = KINDS[kind](), tiny_images()
    plain, before = backbone(images), backbone.state_dict()
    wrappers = put_beside_mlp(backbone, [0, 1], bottleneck)
    assert torch.equal(backbone(images), plain)
    with pytest.raises(ValueError, match="wrapped already"):
        put_beside_mlp(backbone, [1], bottleneck)
    with pytest.raises(ValueError, match="layer 2"):
        put_beside_mlp(backbone, [2], bottleneck)
    moved(wrappers[0].update, 0)
    assert not torch.equal(backbone(images), plain)
    unwrap_mlp(backbone)
    after = backbone.state_dict()
    assert torch.equal(backbone(images), plain) and after.keys() == before.keys()
    assert all(after[key].data_ptr() == x.data_ptr() for key, x in before.items())


def test_gradients_reach_the_adapter_alone() -> None:
    backbone = tiny_backbone("dinov2_registers")
    wrappers = put_beside_mlp(backbone, [0, 1], bottleneck)
    moved(wrappers[0].update, 0)
    backbone(tiny_images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in wrappers[0].update.parameters())
    own = [p for name, p in backbone.named_parameters() if ".update." not in name]
    assert all(p.grad is None for p in own)


@torch.no_grad()
def test_each_image_may_have_the_adapter_of_its_own_task() -> None:
    backbone, images, chosen = tiny_backbone(), tiny_images(4), PerPass[int | torch.Tensor]()
    wrappers = put_beside_mlp(backbone, [0, 1], lambda dim: TaskBottlenecks(dim, 6, 0.5, chosen))
    plain = backbone(images)
    for task in range(3):
        for layer, wrapper in wrappers.items():
            update = wrapper.update
            assert isinstance(update, TaskBottlenecks)
            moved(update.open(torch.Generator().manual_seed(task), images.device), 10 * task + layer)
    assert torch.equal(backbone(images), plain), "none is chosen"
    of_task = []
    for task in range(3):
        with chosen.holding(task):
            of_task.append(backbone(images))
    own = torch.tensor([2, 0, 1, 2])
    with chosen.holding(own):
        found = backbone(images)
    expected = torch.stack(of_task)[own, torch.arange(4)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert float((of_task[0] - of_task[1]).abs().max()) > 0.02


def test_an_earlier_task_is_frozen() -> None:
    updates = TaskBottlenecks(WIDTH, 6, 0.5, PerPass())
    first = updates.open(torch.Generator().manual_seed(0), torch.device("cpu"))
    assert all(p.requires_grad for p in first.parameters())
    second = updates.open(torch.Generator().manual_seed(1), torch.device("cpu"))
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())


@torch.no_grad()
def test_its_products_are_counted() -> None:
    """It is in no weight, so that a pass costs more by its two products a layer and token."""
    backbone, images = tiny_backbone(), tiny_images(2)
    before = flops(lambda: backbone(images))
    put_beside_mlp(backbone, [0, 1], bottleneck)
    tokens = 16 + backbone.num_prefix_tokens
    assert flops(lambda: backbone(images)) - before == 2 * 2 * tokens * 2 * (2 * WIDTH * 6)
