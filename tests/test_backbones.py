"""Frozen backbones: embedded weights, names, local files, and what must never change."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from duallora.backbones import EMBEDDED_FILE, BackboneInfo, load_backbone, state_sha256
from duallora.errors import DualLoRAError
from tiny import tiny_backbone, tiny_images, tiny_model

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
    assert embedded(torch.zeros(2, 3, 64, 64)).shape == (2, 192)


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
    assert torch.equal(backbone(images), expected)
    assert backbone.attention(1) is backbone.model.blocks[1].attn


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
    assert first(torch.zeros(1, *first.info.input_size)).shape == (1, first.feature_dim)


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
