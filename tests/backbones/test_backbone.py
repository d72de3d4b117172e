"""Frozen backbones: embedded weights, names, local files, and what must never change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images, tiny_model

from duallora.backbones.backbone import EMBEDDED_FILE, BackboneInfo, load_backbone, state_sha256
from duallora.errors import DualLoRAError

EMBEDDED_SHA256 = "8ede3b3ba83e108d57ca1d63d872e2c7eac94d997864421a81dedc099d89cc74"
EMBEDDED_PATH = Path(str(resources.files("duallora") / "weights" / EMBEDDED_FILE))
SMALL = "test_vit.r160_in1k"  # timm's own miniature, for what needs a real name


@pytest.fixture(scope="module")
def embedded():
    return load_backbone()


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file(timm.create_model(SMALL).state_dict(), path)
    return path


def test_embedded_weights_and_preprocessing(embedded):
    info = embedded.info
    assert (info.name, info.sha256, info.file) == ("embedded", EMBEDDED_SHA256, None)
    assert info.mean == (0.485, 0.456, 0.406)
    assert info.std == (0.229, 0.224, 0.225)
    assert info.input_size == (3, 64, 64)
    assert (embedded.dim, embedded.depth, embedded.feature_dim) == (192, 6, 192)
    assert (embedded.early, embedded.row_dim) == (2, 4 * 192)
    assert embedded.has_class_token and embedded.num_prefix_tokens == 1
    assert embedded.pooling == "class token"
    classifier = 192 * 100 + 100
    assert sum(p.numel() for p in embedded.parameters()) == 3_016_388 - classifier


def test_embedded_tensors_are_those_of_the_file_in_fp32(embedded):
    state = embedded.model.state_dict()
    with safe_open(EMBEDDED_PATH, framework="pt") as opened:
        kept = [key for key in opened.keys() if not key.startswith("head.")]  # noqa: SIM118
        assert set(kept) == set(state)
        for key in kept:
            assert torch.equal(opened.get_tensor(key).to(state[key].dtype), state[key])
    assert {p.dtype for p in embedded.parameters()} == {torch.float32}
    assert embedded(torch.zeros(2, 3, 64, 64)).shape == (2, 4 * 192)


def test_model_card_names_the_shipped_file():
    assert hashlib.sha256(EMBEDDED_PATH.read_bytes()).hexdigest() == EMBEDDED_SHA256
    assert EMBEDDED_SHA256 in EMBEDDED_PATH.with_suffix(".md").read_text()


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_backbone()
    load_backbone(SMALL, pretrained=False)
    assert torch.equal(torch.rand(4), expected)


def test_stays_frozen_and_in_evaluation_mode(embedded):
    before = {key: value.clone() for key, value in embedded.state_dict().items()}
    assert embedded.train() is embedded
    assert not any(module.training for module in embedded.modules())
    assert not any(p.requires_grad for p in embedded.parameters())
    embedded(torch.randn(4, 3, 64, 64))
    torch.nn.Sequential(embedded).train()
    embedded(torch.randn(4, 3, 64, 64))
    after = embedded.state_dict()
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_feature_is_what_timm_gives_before_its_classifier():
    model, images = tiny_model(), tiny_images()
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    backbone = tiny_backbone()
    assert torch.equal(backbone(images)[:, : backbone.feature_dim], expected)
    assert backbone.attention(1) is backbone.model.blocks[1].attn


# Family, changes, and the parts behind the final feature: mean patch token after the last block, class token
# and mean patch token as they enter the attention of the early layer.
ABOVE, CLASS, BELOW = "above", "class", "below"
PARTS = [
    *((family, {}, (ABOVE, CLASS, BELOW)) for family in FAMILIES if family != "siglip"),
    ("siglip", {}, (ABOVE, BELOW)),
    ("vit", {"global_pool": "avg"}, (CLASS, BELOW)),
    ("vit", {"global_pool": "avg", "class_token": False}, (BELOW,)),
    ("vit", {"global_pool": "avg", "fc_norm": False}, (CLASS, BELOW)),
    ("dinov2_registers", {"global_pool": "avg"}, (CLASS, BELOW)),
    ("vit", {"global_pool": "max"}, (ABOVE, CLASS, BELOW)),
    ("vit", {"depth": 1}, (ABOVE,)),
    ("siglip", {"depth": 1}, (ABOVE,)),
    ("vit", {"depth": 1, "global_pool": "avg"}, ()),
    ("vit", {"depth": 3}, (ABOVE, CLASS, BELOW)),
    ("vit", {"depth": 7}, (ABOVE, CLASS, BELOW)),
]
every_kind = pytest.mark.parametrize(
    ("family", "changes", "parts"),
    PARTS,
    ids=[" ".join([family, *(f"{k}={v}" for k, v in changes.items())]) for family, changes, _ in PARTS],
)


def timm_alone(family, changes, images):
    """Final feature, tokens after the last block and what enters the attention of the early layer."""
    model, entering = tiny_model(family, **changes), []
    depth = len(model.blocks)
    early = {1: None, 2: 1, 3: 1, 7: 2}[depth]
    if early is not None:
        model.blocks[early].norm1.register_forward_hook(lambda _, __, y: entering.append(y))
    with torch.no_grad():
        tokens = model.forward_features(images)
        return model.forward_head(tokens, pre_logits=True), tokens, *(entering or [None])


@every_kind
def test_the_columns_are_timms_own(family, changes, parts):
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    final, tokens, entering = timm_alone(family, changes, images)
    first = backbone.num_prefix_tokens
    expected = [final]
    for part in parts:
        if part == CLASS:
            expected.append(entering[:, 0])
        else:
            expected.append((tokens if part == ABOVE else entering)[:, first:].mean(1))
    expected = torch.cat(expected, 1)
    found = backbone(images)
    assert found.shape == (3, backbone.row_dim) == expected.shape
    assert backbone.feature_dim == WIDTH and backbone.row_dim == (1 + len(parts)) * WIDTH
    assert torch.equal(found[:, :WIDTH], final)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    columns = found.split(WIDTH, 1)
    for i, a in enumerate(columns):
        assert all((a - b).abs().max() > 1e-2 for b in columns[:i]), "no part is another one again"
        assert (a - a.roll(1, 0)).abs().max() > 1e-4, "every part depends on the image"


@every_kind
def test_an_image_has_its_columns_in_any_batch(family, changes, parts):
    backbone, images = tiny_backbone(family, **changes), tiny_images(4)
    alone = torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(backbone(images), alone, rtol=0, atol=1e-5)


@every_kind
def test_gradients_reach_the_final_feature_from_every_block(family, changes, parts):
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    weights = [backbone.attention(layer).qkv.weight.requires_grad_() for layer in range(backbone.depth)]
    direction = torch.linspace(-1, 1, WIDTH)
    found = torch.autograd.grad((backbone(images)[:, :WIDTH] * direction).sum(), weights)
    model = tiny_model(family, **changes)
    same = [block.attn.qkv.weight for block in model.blocks]
    plain = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = torch.autograd.grad((plain * direction).sum(), same)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@every_kind
def test_under_autocast_all_parts_are_in_fp32_and_near(family, changes, parts):
    backbone, images = tiny_backbone(family, **changes), tiny_images()
    plain = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(images)
    assert plain.dtype == rounded.dtype == torch.float32
    for a, b in zip(rounded.split(WIDTH, 1), plain.split(WIDTH, 1), strict=True):
        assert 0 < (a - b).abs().max() < 0.1 * b.abs().max()


def test_what_lies_below_the_adapters_does_not_move_with_them():
    backbone, images = tiny_backbone(depth=6), tiny_images()
    plain = backbone(images)
    assert backbone.early == 2
    with torch.no_grad():
        for layer in range(2, 6):
            backbone.attention(layer).qkv.weight.mul_(1.5)
    moved = backbone(images)
    assert torch.equal(moved[:, 2 * WIDTH :], plain[:, 2 * WIDTH :])
    for part in (0, WIDTH):
        assert (moved - plain)[:, part : part + WIDTH].abs().max() > 1e-2


def test_info_survives_json():
    info = tiny_backbone().info
    assert BackboneInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_untagged_name_lists_the_tags():
    with pytest.raises(DualLoRAError, match="full tag") as caught:
        load_backbone("vit_base_patch16_224")
    assert "vit_base_patch16_224.augreg_in21k," in str(caught.value)
    assert "vit_base_patch16_224.orig_in21k," in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224.augreg_in22k", "no tag 'augreg_in22k'.*vit_base_patch16_224.augreg_in21k"),
        ("vit_bas_patch16_224.augreg_in21k", "nearest: vit_base_patch16_224.augreg_in21k"),
        ("embeded", "nearest: embedded"),
        ("weights.safetensors", "--backbone-file"),
        ("", "full tag"),
        ("../../etc", "no backbone"),
        ("vit_base_patch16_18x2_224.untrained", "ParallelThingsBlock"),
        ("vit_huge_patch14_224.untrained", "timm has no weights"),
    ],
)
def test_wrong_names_get_one_sentence_with_the_remedy(name, expected):
    with pytest.raises(DualLoRAError, match=expected) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_random_timm_model_is_always_the_same_and_carries_its_data_config():
    first, second = load_backbone(SMALL, pretrained=False), load_backbone(SMALL, pretrained=False)
    assert first.info == second.info
    assert first.info.sha256 == state_sha256(first.model)
    config = timm.data.resolve_model_data_config(timm.create_model(SMALL))
    assert first.info.mean == config["mean"] and first.info.std == config["std"]
    assert first.info.input_size == config["input_size"]
    assert (first.info.interpolation, first.info.crop_pct) == (config["interpolation"], config["crop_pct"])
    assert first(torch.zeros(1, *first.info.input_size)).shape == (1, first.row_dim)


def test_sha256_of_a_model_depends_on_its_weights_alone():
    model = tiny_model()
    whole = state_sha256(model)
    model.reset_classifier(0)
    assert state_sha256(model) == whole
    with torch.no_grad():
        model.cls_token[0, 0, 0] += 1e-6
    assert state_sha256(model) != whole


def test_download_failure_is_one_sentence(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("name or service not known\nretry 5 of 5")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DualLoRAError, match=r"could not be downloaded.*--backbone-file") as caught:
        load_backbone(SMALL)
    assert "\n" not in str(caught.value) and f"timm/{SMALL}/" in str(caught.value)


def test_local_file_with_and_without_classifier(small_file, tmp_path):
    backbone = load_backbone(SMALL, small_file)
    assert backbone.info.sha256 == hashlib.sha256(small_file.read_bytes()).hexdigest()
    assert backbone.info.file == str(small_file)
    bare = tmp_path / "bare.safetensors"
    save_file(backbone.model.half().state_dict(), bare)
    assert {p.dtype for p in load_backbone(SMALL, bare).parameters()} == {torch.float32}


def test_local_file_of_the_embedded_architecture(tmp_path, small_file):
    assert load_backbone("embedded", EMBEDDED_PATH).info.sha256 == EMBEDDED_SHA256
    with pytest.raises(DualLoRAError, match="no file for the embedded backbone"):
        load_backbone("embedded", small_file)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_file_that_does_not_fit_is_refused(damage, tmp_path):
    state = timm.create_model(SMALL).state_dict()
    if damage == "missing":
        del state["blocks.0.attn.qkv.weight"]
    elif damage == "unknown":
        state["blocks.0.attn.extra.weight"] = torch.zeros(1)
    else:
        state["blocks.0.attn.qkv.weight"] = torch.zeros(2, 2)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path)
    with pytest.raises(DualLoRAError, match=rf"does not hold the weights of {SMALL}.*blocks\.0\.attn"):
        load_backbone(SMALL, path)


@pytest.mark.parametrize("kind", ["nowhere", "folder", "foreign", "truncated"])
def test_unreadable_file_is_one_sentence(kind, tmp_path, small_file):
    path = tmp_path if kind == "folder" else tmp_path / "other.safetensors"
    if kind == "foreign":
        path.write_bytes(b"PK\x03\x04 this is a pickle in a zip file")
    if kind == "truncated":
        path.write_bytes(small_file.read_bytes()[:-100])
    with pytest.raises(DualLoRAError, match=r"cannot be read|not a complete") as caught:
        load_backbone(SMALL, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_embedded_backbone_at_another_size(embedded):
    backbone = load_backbone(image_size=96)
    assert backbone.info == replace(embedded.info, input_size=(3, 96, 96))
    assert backbone(torch.zeros(2, 3, 96, 96)).shape == (2, backbone.row_dim)
    assert backbone.model.pos_embed.shape[1] == 1 + 12 * 12
    with pytest.raises(
        DualLoRAError, match=r"100 x 100 do not fit the 8 x 8 patches of embedded.*size is 96"
    ):
        load_backbone(image_size=100)
    assert torch.equal(
        load_backbone(image_size=64)(torch.ones(1, 3, 64, 64)), embedded(torch.ones(1, 3, 64, 64))
    )


@pytest.mark.parametrize("size", [96, 240])
def test_another_size_is_timms_own(size, small_file):
    backbone = load_backbone(SMALL, small_file, image_size=size)
    native = load_backbone(SMALL, small_file)
    assert backbone.info == replace(native.info, input_size=(3, size, size))
    model = timm.create_model(SMALL.partition(".")[0], img_size=size).eval()
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(load_file(small_file), model))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone(images)[:, : backbone.feature_dim], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "near"), [(100, 96), (7, 16), (1, 16), (0, 16), (-16, 16), (168, 160)])
def test_a_size_that_does_not_fit_names_the_nearest(size, near):
    with pytest.raises(DualLoRAError, match=f"16 x 16 patches of {SMALL}; the nearest image size is {near}"):
        load_backbone(SMALL, image_size=size)  # before any download


def test_a_size_that_no_saved_model_may_have_is_refused():
    with pytest.raises(DualLoRAError, match="at most 1536 pixels, not 1600"):
        load_backbone(image_size=1600)


def test_images_are_prepared_as_asked():
    plain = load_backbone(SMALL, pretrained=False).info
    other = load_backbone(
        SMALL, pretrained=False, normalization="none", crop_pct=0.5, interpolation="bilinear"
    ).info
    changes = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 0.5, "interpolation": "bilinear"}
    assert other == replace(plain, **changes) != plain
    imagenet = load_backbone(normalization="imagenet").info
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for wrong in ({"normalization": "other"}, {"crop_pct": 0.0}, {"crop_pct": 1.5}):
        with pytest.raises(DualLoRAError, match=next(iter(wrong))):
            load_backbone(**wrong)


def test_a_stored_backbone_is_the_same_again(small_file):
    changed = {"image_size": 96, "normalization": "none", "crop_pct": 0.8, "interpolation": "bilinear"}
    backbone, images = load_backbone(SMALL, small_file, **changed), torch.ones(1, 3, 96, 96)
    stored = BackboneInfo.from_dict(json.loads(json.dumps(backbone.info.to_dict() | {"file": None})))
    again = load_backbone(stored, small_file)
    assert again.info == backbone.info and torch.equal(again(images), backbone(images))
    assert load_backbone(backbone.info).info == backbone.info
    embedded = load_backbone(image_size=32, normalization="none")
    assert load_backbone(BackboneInfo.from_dict(embedded.info.to_dict())).info == embedded.info


def test_what_an_earlier_version_stored_is_read():
    fields = {
        "name": "embedded",
        "sha256": EMBEDDED_SHA256,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "file": None,
        "crop_mode": "center",
    }
    info = BackboneInfo.from_dict(fields)
    assert info.to_dict() == fields
    assert load_backbone(info).info == info == load_backbone().info
    assert hash(info) == hash(load_backbone().info)
