"""Supported families: adapters act as an edit of the weights would; all others are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models import vision_transformer
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ResPostBlock, VisionTransformer
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images, tiny_model
from torch import nn
from torch.nn import functional as F

from duallora.adapters.dual_lora import AdaptedQKV
from duallora.adapters.wrapped_qkv import unwrap_attention, wrap_attention
from duallora.backbones.backbone import Backbone, load_backbone
from duallora.errors import DualLoRAError

RANK, LAYERS, TASKS = 3, (0, 1), 2
VARIANTS = {"qk_norm": {"qk_norm": True}, "scale_norm": {"scale_attn_norm": True, "norm_layer": LayerNorm}}
CASES = [(family, {}) for family in FAMILIES] + [("vit", changes) for changes in VARIANTS.values()]
NAMES = [*FAMILIES, *VARIANTS]
every_family = pytest.mark.parametrize(("family", "changes"), CASES, ids=NAMES)
every_group = pytest.mark.parametrize("groups", [("kv",), ("q", "v"), ("q", "k", "v")], ids=":".join)


def random(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapt(backbone, groups):
    return wrap_attention(backbone, LAYERS, lambda qkv: AdaptedQKV(qkv, groups))


def open_task(modules, task):
    """A random orthogonal basis for A and Psi, and updates B and C that are not zero."""
    for layer, module in modules.items():
        for name, adapter in module.groups.items():
            seed = 100 * task + 10 * layer + len(name) + ord(name[0])
            basis = torch.linalg.qr(random(WIDTH, 2 * RANK, seed=seed, scale=1))[0]
            adapter.begin(task, basis[:, :RANK].contiguous(), basis[:, RANK:].contiguous())
            adapter.b.data.copy_(random(RANK, adapter.out, seed=seed + 1, scale=1))
            adapter.c.data.copy_(random(RANK, adapter.out, seed=seed + 2, scale=1))


def edited(family, changes, modules, update):
    """The same backbone with ``update(adapter)`` (d x out) added to the rows of ``qkv.weight`` by hand."""
    backbone = tiny_backbone(family, **changes)
    for layer, module in modules.items():
        weight = backbone.attention(layer).qkv.weight
        for name, adapter in module.groups.items():
            columns = torch.cat([torch.arange(3 * WIDTH).reshape(3, WIDTH)["qkv".index(p)] for p in name])
            with torch.no_grad():
                weight[columns] += update(adapter).T
    return backbone


def gate(modules, *weights):
    for module in modules.values():
        module.gate = lambda x: torch.tensor([weights]).expand(len(x), -1)


def assert_moved(before, after):
    assert (before - after).norm() > 1e-2 * before.norm()


@every_family
def test_every_block_has_the_plain_attention(family, changes):
    backbone = tiny_backbone(family, **changes)
    assert backbone.depth == 2 and backbone.dim == backbone.feature_dim == WIDTH
    for layer in range(backbone.depth):
        attention = backbone.attention(layer)
        assert type(attention) is Attention and type(attention.qkv) is nn.Linear
        assert attention.num_heads == 2 and attention.fused_attn in (True, False)


@every_family
def test_a_wrapper_sees_every_token_and_its_output_is_used(family, changes):
    class Doubled(nn.Module):
        def __init__(self, qkv):
            super().__init__()
            self.qkv, self.shape = qkv, None

        def forward(self, x):
            self.shape = x.shape
            return 2 * self.qkv(x)

    backbone, images = tiny_backbone(family, **changes), tiny_images()
    plain = backbone(images)
    wrappers = wrap_attention(backbone, LAYERS, Doubled)
    doubled = backbone(images)
    assert_moved(plain, doubled)
    assert {w.shape for w in wrappers.values()} == {(3, 16 + backbone.num_prefix_tokens, WIDTH)}
    unwrap_attention(backbone)
    assert torch.equal(backbone(images), plain)


@every_family
def test_zero_adapters_change_nothing(family, changes):
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    plain = backbone(images)
    modules = adapt(backbone, ("kv",))
    assert torch.equal(backbone(images), plain)
    for module in modules.values():
        module.groups["kv"].begin(0, random(WIDTH, RANK), random(WIDTH, RANK, seed=1))
    gate(modules, 1.0)
    assert torch.equal(backbone(images), plain)


def near(found, expected):
    """Equal to 1e-5 of the largest value: fp32 rounds by that scale, and how depends on the processor."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-5)


@every_group
@every_family
def test_orthogonal_update_equals_an_edit_of_the_weights(family, changes, groups):
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    plain = backbone(images)
    modules = adapt(backbone, groups)
    open_task(modules, 0)
    expected = edited(family, changes, modules, lambda adapter: adapter.a @ adapter.b)(images)
    unmerged = backbone(images)
    for module in modules.values():
        module.merge()
    assert_moved(plain, unmerged)
    near(unmerged, expected)
    near(backbone(images), expected)
    untouched = tiny_backbone(family, **changes)
    for layer, module in modules.items():
        assert torch.equal(module.base.weight, untouched.attention(layer).qkv.weight)


@every_group
@every_family
def test_gated_residual_equals_an_edit_of_the_weights(family, changes, groups):
    backbone, images, weights = tiny_backbone(family, **changes), tiny_images(), (0.25, 0.75)
    modules = adapt(backbone, groups)
    for task in range(TASKS):
        open_task(modules, task)
        for module in modules.values():
            module.merge()
    gate(modules, 0.0, 0.0)
    closed = backbone(images)
    gate(modules, *weights)
    opened = backbone(images)

    def update(adapter):
        gated = sum(w * part.psi @ part.c for w, part in zip(weights, adapter.residuals, strict=True))
        return adapter.delta_weight() + gated

    assert_moved(closed, opened)
    expected = edited(family, changes, modules, update)(images)
    near(opened, expected)
    expected = edited(family, changes, modules, lambda adapter: adapter.delta_weight())(images)
    near(closed, expected)


@every_family
def test_the_gate_acts_per_image(family, changes):
    backbone, images = tiny_backbone(family, **changes), tiny_images(2)
    modules = adapt(backbone, ("kv",))
    open_task(modules, 0)
    alone = []
    for weight in (0.2, 0.9):
        gate(modules, weight)
        alone.append(backbone(images))
    for module in modules.values():
        module.gate = lambda x: torch.tensor([[0.2], [0.9]])
    mixed = backbone(images)
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), atol=1e-5, rtol=1e-5)


@every_family
def test_adapters_and_nothing_else_receive_gradients(family, changes):
    backbone = tiny_backbone(family, **changes)
    modules = adapt(backbone, ("q", "kv"))
    open_task(modules, 0)
    gate(modules, 0.5)
    backbone(tiny_images()).square().sum().backward()
    for module in modules.values():
        for adapter in module.groups.values():
            assert adapter.b.grad.abs().max() > 0 and adapter.c.grad.abs().max() > 0
            assert adapter.a.grad is None
    trained = {id(p) for m in modules.values() for a in m.groups.values() for p in (a.b, a.c)}
    assert {id(p) for p in backbone.parameters() if p.grad is not None} == trained


def test_what_is_pooled_is_said_in_words():
    words = {family: tiny_backbone(family).pooling for family in FAMILIES}
    assert words["vit"] == words["clip"] == words["dinov2_registers"] == "class token"
    assert words["deit_distilled"] == "mean of the class token and the distillation token"
    assert words["siglip"].startswith("attention pooling over the tokens")
    assert "no class token" in words["siglip"] and "mean token" in words["siglip"]
    averaged = tiny_backbone("vit", global_pool="avg", class_token=False)
    assert averaged.pooling.startswith("mean of the tokens")
    assert tiny_backbone("vit", global_pool="avg").pooling == "mean of the patch tokens"


def test_prefix_tokens_of_each_family():
    found = {f: (b.has_class_token, b.num_prefix_tokens) for f in FAMILIES for b in [tiny_backbone(f)]}
    assert found == {
        "vit": (True, 1),
        "deit_distilled": (True, 2),
        "dinov2_registers": (True, 5),
        "clip": (True, 1),
        "siglip": (False, 0),
    }


SMALL_EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}

OTHERS = {
    "SwinTransformer": lambda: SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,)
    ),
    "ParallelScalingBlock": lambda: tiny_model(block_fn=ParallelScalingBlock),
    "ResPostBlock": lambda: tiny_model(block_fn=ResPostBlock),
    "EvaBlockPostNorm": lambda: with_post_norm(),
    "AttentionOfMyOwn": lambda: with_own_attention(),
    "ViTOfMyOwn": lambda: ViTOfMyOwn(**SMALL_EVA),
    "BeitOfMyOwn": lambda: BeitOfMyOwn(**SMALL_EVA),
    "Linear": lambda: nn.Linear(2, 2),
}
if hasattr(vision_transformer, "DiffAttention"):  # from timm 1.0.23 on
    OTHERS["DiffAttention"] = lambda: tiny_model(attn_layer=vision_transformer.DiffAttention)


def with_post_norm():
    model = Eva(**SMALL_EVA)
    model.blocks[0] = EvaBlockPostNorm(WIDTH, 2)
    return model


def with_own_attention():
    model = tiny_model()
    model.blocks[1].attn.__class__ = AttentionOfMyOwn
    return model


class AttentionOfMyOwn(Attention):
    """Reads the weight itself, as some subclasses do."""


class ViTOfMyOwn(VisionTransformer):
    """May replace any step of the forward pass."""


class BeitOfMyOwn(Beit):
    """The same."""


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_refused_by_name(kind):
    with pytest.raises(DualLoRAError, match=rf"some-name is .*{kind}.* cannot carry adapters: ") as caught:
        Backbone(OTHERS[kind](), tiny_info("some-name"))
    assert "duallora backbones" in str(caught.value) and "\n" not in str(caught.value)


def test_gates_foreign_projections_fewer_heads_and_missing_pooling_are_refused():
    gated = tiny_model()
    gated.blocks[1].attn.gate = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(DualLoRAError, match="no adapter covers the projection of its gate"):
        Backbone(gated, tiny_info())
    foreign = tiny_model()
    foreign.blocks[0].attn.qkv = nn.Bilinear(WIDTH, WIDTH, WIDTH)
    with pytest.raises(DualLoRAError, match="qkv is a Bilinear"):
        Backbone(foreign, tiny_info())
    grouped = Eva(qkv_fused=False, **SMALL_EVA)
    for part in ("k_proj", "v_proj"):
        setattr(grouped.blocks[0].attn, part, nn.Linear(WIDTH, WIDTH // 2))
    with pytest.raises(DualLoRAError, match="fewer heads than its queries"):
        Backbone(grouped, tiny_info())
    with pytest.raises(DualLoRAError, match="without pooling"):
        Backbone(tiny_model(global_pool=""), tiny_info())


def reads_the_weight(attention, x):
    return F.linear(x, attention.qkv.weight)[..., :WIDTH]


def calls_it_twice(attention, x):
    return (attention.qkv(x) + attention.qkv(x))[..., :WIDTH]


def calls_it_and_reads_the_weight(attention, x):
    return attention.qkv(x)[..., :WIDTH] + attention.qkv.weight.sum()


@pytest.mark.parametrize("forward", [reads_the_weight, calls_it_twice, calls_it_and_reads_the_weight])
def test_an_attention_that_goes_around_qkv_is_found_out(forward, monkeypatch):
    """Even one of a known type: another version of timm may compute otherwise."""
    model = tiny_model()
    before = [block.attn.qkv for block in model.blocks]
    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(DualLoRAError, match=r"a ViT with Attention .*bypass an adapter without an error"):
        Backbone(model, tiny_info())
    assert [block.attn.qkv for block in model.blocks] == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224.ms_in1k", "'swin_transformer'.*none of the plain ViTs"),
        ("resnet18.a1_in1k", "'resnet'.*none of the plain ViTs"),
        ("vit_dwee_patch16_reg1_gap_256.sbb_nadamuon_in1k", "DiffAttention"),
        ("vit_base_patch16_rpn_224.sw_in1k", "ResPostBlock"),
        ("eva02_enormous_patch14_clip_224.laion2b", "EvaBlockPostNorm|blocks differ"),
        ("vit_base_patch16_sapiens2.fb", "whose blocks differ"),
    ],
)
def test_names_of_other_families_are_refused_before_any_download(name, reason):
    if name not in timm.list_models(pretrained=True):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(DualLoRAError, match=reason):
        load_backbone(name)


def test_wrapping_twice_or_beyond_the_depth_changes_nothing():
    backbone = tiny_backbone()
    first = wrap_attention(backbone, [1], lambda qkv: nn.Sequential(qkv).train())
    assert not any(module.training for module in backbone.modules())
    for layers in ([0, 1], [0, 2], [-1]):
        with pytest.raises(ValueError, match="layer"):
            wrap_attention(backbone, layers, lambda qkv: nn.Sequential(qkv))
    assert type(backbone.attention(0).qkv) is nn.Linear
    assert backbone.attention(1).qkv is first[1]
    unwrap_attention(backbone)
    unwrap_attention(backbone)
    assert set(wrap_attention(backbone, [0, 1], lambda qkv: nn.Sequential(qkv))) == {0, 1}


def tiny_info(name="tiny"):
    return replace(tiny_backbone().info, name=name)
