"""The LoRA that peft loads gives the features that the learner has, within the error that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, caller
from small_tasks import new_learner, small_config, three_tasks
from tiny import tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError, load_backbone
from duallora.backbones.projections import projection_names
from duallora.bench.synthetic import simulated_learner
from duallora.export import peft as module
from duallora.export.peft import least_rank, to_peft

pytestmark = pytest.mark.slow  # peft takes seconds to import

NAMES: Callable[[Any, int], tuple[str, ...]] = lambda _, layer: (f"blocks.{layer}.attn.qkv",)  # noqa: E731


@pytest.fixture(autouse=True)
def _tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbones are timm's by their classes, and by no name."""
    monkeypatch.setattr(module, "projection_names", NAMES)
    monkeypatch.setattr(module, "made_from", lambda _: "the tiny model")


def learned(config: DualLoRAConfig, tasks: int = 2) -> ContinualLearner:
    return simulated_learner(tiny_backbone(), config, tasks=tasks, classes=2)


def adapted(model: nn.Module, folder: Path, images: Tensor) -> Tensor:
    """Final features (n, d) of timm's model with the LoRA that peft loads."""
    peft = pytest.importorskip("peft")
    whole = peft.PeftModel.from_pretrained(model, str(folder))
    inner: Any = whole.base_model.model
    with torch.no_grad():
        return inner.forward_head(inner.forward_features(images), pre_logits=True)  # type: ignore[no-any-return]


def final_features(learner: ContinualLearner, images: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.method.final(learner.method.extract(images))


def assert_same(found: Tensor, wanted: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


ORTHOGONAL = DualLoRAConfig(rank=4, residual="none", projections="qkv")
OFF = DualLoRAConfig(rank=4, residual="own", residual_rank=3, gate="off")


@pytest.mark.parametrize(
    "config", [ORTHOGONAL, OFF, replace(ORTHOGONAL, moments="class_token", projections="qv")]
)
def test_peft_gives_the_features_of_the_learner(config: DualLoRAConfig, tmp_path: Path) -> None:
    learner, images = learned(config), tiny_images(4)
    done = to_peft(learner, tmp_path / "lora", 0.0)
    assert done.error < 1e-5
    found = adapted(tiny_model(), tmp_path / "lora", images)
    assert_same(found, final_features(learner, images))
    with torch.no_grad():
        plain: Any = tiny_model()
        bare = plain.forward_head(plain.forward_features(images), pre_logits=True)
    assert float((found - bare).abs().max()) > 1e-2, "the update has to matter for this to show anything"
    about = json.loads((tmp_path / "lora" / "duallora.json").read_text())
    assert about["gate"] == done.gate and about["tasks"] == ["synthetic 1", "synthetic 2"]


def test_the_adapter_of_one_domain_is_in_the_update(tmp_path: Path) -> None:
    learner, images = learned(replace(OFF, gate="first"), tasks=1), tiny_images(4)
    done = to_peft(learner, tmp_path / "lora", 0.0)
    assert "weight is 1 for every image" in done.gate
    assert_same(adapted(tiny_model(), tmp_path / "lora", images), final_features(learner, images))


def test_several_domains_are_refused_or_one_is_named(tmp_path: Path) -> None:
    config = replace(OFF, gate="first", known_domain=1.5)  # every task its own
    learner, images = learned(config), tiny_images(4)
    with pytest.raises(DualLoRAError, match=r"residual adapters of 2 domains .* --task"):
        to_peft(learner, tmp_path / "lora", 0.0)
    with pytest.raises(DualLoRAError, match="no task 'other'"):
        to_peft(learner, tmp_path / "lora", 0.0, "other")
    assert not (tmp_path / "lora").exists()
    done = to_peft(learner, tmp_path / "lora", 0.0, "synthetic 2")
    assert "for images of synthetic 2: its residual adapter with weight 1" in done.gate
    memory: Any = vars(learner.method)["memory"]
    for point in memory.points.values():  # a gate that is sure of the second task
        point.weights = lambda f, own=None, uses=(): torch.tensor([[0.0, 1.0]]).expand(len(f), -1)
    assert_same(adapted(tiny_model(), tmp_path / "lora", images), final_features(learner, images))


def test_a_larger_error_gives_a_smaller_rank_and_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(24, 8, generator=generator)).Q for _ in range(2))
    update = u @ torch.diag(0.5 ** torch.arange(8.0)) @ v.T
    ranks = []
    for error in (0.0, 0.01, 0.1, 0.5):
        a, b, found = least_rank(update, error)
        ranks.append(len(a))
        assert found <= max(error, 1e-6)
        assert found == pytest.approx(float((update - b @ a).norm() / update.norm()), abs=1e-6)
        if len(a) > 1:  # one direction less would be too far
            fewer = b[:, :-1] @ a[:-1]
            assert float((update - fewer).norm() / update.norm()) > error
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 8 and ranks[-1] < 3


@pytest.mark.parametrize(
    ("name", "reason"), [("frozen", "added nothing"), ("color", "no matrix"), ("l2p", "added nothing")]
)
def test_methods_without_a_fixed_update_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    learner = new_learner(small_config(name))
    learner.learn(three_tasks()[0])
    with pytest.raises(DualLoRAError, match=reason):
        to_peft(learner, tmp_path / "lora", 0.01)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", ["lora", "inflora", "sd-lora"])
def test_other_methods_have_one(name: str, tmp_path: Path) -> None:
    learner = new_learner(small_config(name))
    for task in three_tasks()[:2]:
        learner.learn(task)
    to_peft(learner, tmp_path / "lora", 0.0)
    images = tiny_images(3)
    assert_same(adapted(tiny_model(), tmp_path / "lora", images), final_features(learner, images), 1e-3)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_a_hugging_face_model_takes_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.50")
    peft = pytest.importorskip("peft")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    own = {"intermediate_size": 64} if kind == "ViT" else {"mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(**sizes, **own)
        ).eval()
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.2)
    plain.save_pretrained(tmp_path / "plain")
    backbone = load_backbone(f"hf:{tmp_path / 'plain'}")
    monkeypatch.setattr(module, "projection_names", projection_names)
    learner = simulated_learner(backbone, ORTHOGONAL, tasks=2, classes=2)
    done = to_peft(learner, tmp_path / "lora", 0.0)
    assert len(done.ranks) == 2 * 3, "q, k and v apart, in the two layers that are adapted"
    assert set(done.ranks.values()) == {8}, "two tasks of rank 4"
    images = tiny_images(3)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(plain, str(tmp_path / "lora"))(images).last_hidden_state[:, 0]
    assert_same(found, final_features(learner, images), 1e-3)


def test_names_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    info = load_backbone("vit_tiny_patch16_224.augreg_in21k", pretrained=False, image_size=32).info
    assert projection_names(info, 3) == ("blocks.3.attn.qkv",)
    rotary = replace(info, name="eva02_base_patch14_224.mim_in22k")
    assert projection_names(rotary, 1) == tuple(f"blocks.1.attn.{p}_proj" for p in "qkv")
    bypassed = replace(info, name="beit_base_patch16_224.in22k_ft_in22k")
    with pytest.raises(DualLoRAError, match="without calling their layer"):
        projection_names(bypassed, 1)


def test_the_command_tells_rank_error_and_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call, model = caller(capsys), tmp_path / "model"
    monkeyed = simulated_learner(load_backbone(), DualLoRAConfig(residual="none"), 2, 3)
    monkeyed.save(model)
    called = call("export", model, "--format", "peft", "--out", tmp_path / "lora", "--error", 0.05)
    assert called.code == 0, called
    assert "relative error" in called.out and "no residual adapter" in called.out
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "duallora.json",
    }
    again = ("export", model, "--format", "peft", "--out", tmp_path / "lora")
    assert_refused(call(*again), "is there already")
    assert_refused(call("export", model, "--out", tmp_path / "x", "--error", 0.1), "go with --format peft")
    assert_refused(call(*again[:-1], tmp_path / "x", "--error", 2), "--error")
    backbone: Any = load_backbone().model
    found = adapted(backbone, tmp_path / "lora", torch.zeros(1, 3, 64, 64))
    assert_same(found, final_features(ContinualLearner.load(model), torch.zeros(1, 3, 64, 64)), 0.1)
