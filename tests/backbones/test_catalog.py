"""Every family of the table, tiny and at random weights: exact, wrapped, learned on, saved, described."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from small_tasks import Patterns, assert_same_outputs, small_config, three_tasks, unseen
from tiny import IMAGE, WIDTH, tiny_backbone, tiny_images
from torch import nn

from duallora import ContinualLearner, DualLoRAError
from duallora.adapters.dual_lora import AdaptedQKV
from duallora.adapters.moments import check_moments
from duallora.adapters.wrapped_qkv import unwrap_attention, wrap_attention
from duallora.backbones.backbone import Backbone, load_backbone
from duallora.backbones.catalog import FAMILIES, NO_PROMPTS, Family
from duallora.backbones.fused_qkv import calls_qkv
from duallora.backbones.sources import resized
from duallora.commands.backbones import backbones
from duallora.outputs import Outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")

DEPTH, RANK = 2, 3
TIMM = [family for family in FAMILIES if family.source == "timm"]
PATCHES = {"ViT, convolutional stem": 2}  # of the stem's output, which is a quarter of the image
ROTARY = next(family for family in FAMILIES if family.name == "EVA-02")

families = pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)


def architectures(family: Family) -> list[str]:
    """Those of the examples, without their tags; one that this timm does not have skips the test."""
    names = list(dict.fromkeys(example.name.partition(".")[0] for example in family.examples))
    missing = [name for name in names if name not in timm.list_models()]
    if missing:
        pytest.skip(f"timm {timm.__version__} has no {missing[0]}")
    return names


@cache
def weights(architecture: str, size: int, patch: int) -> dict[str, torch.Tensor]:
    """Large random weights: at the usual ones attention is uniform, and hardly any projection matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = built(architecture, size, patch)
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ("norm", "gamma", "ls1", "ls2")):
                nn.init.normal_(parameter, std=0.2)
            elif "gamma" in name:
                nn.init.constant_(parameter, 0.5)
    return model.state_dict()


def built(architecture: str, size: int, patch: int) -> nn.Module:
    return timm.create_model(
        architecture,
        num_classes=0,
        depth=DEPTH,
        embed_dim=WIDTH,
        num_heads=2,
        img_size=size,
        patch_size=patch,
    ).eval()


def tiny(architecture: str, family: Family, size: int = IMAGE) -> nn.Module:
    """A model of a real architecture as timm makes it, on images of a size."""
    patch = PATCHES.get(family.name, 8)
    model, given = built(architecture, size, patch), weights(architecture, IMAGE, patch)
    if size != IMAGE:  # what timm itself does with weights of another size
        given = importlib.import_module(type(model).__module__).checkpoint_filter_fn(dict(given), model)
    model.load_state_dict(given)
    return model


def wrapped(architecture: str, family: Family) -> Backbone:
    return Backbone(tiny(architecture, family), info(architecture))


def info(name: str) -> Any:
    return replace(tiny_backbone().info, name=name)


def timms_feature(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        feature: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        return feature


def part_of(attention: Any, part: str) -> torch.Tensor:
    """Rows of the weight that make q, k or v, in timm's own layout."""
    if getattr(attention, "qkv", None) is None:
        weight: torch.Tensor = getattr(attention, f"{part}_proj").weight
        return weight
    rows: torch.Tensor = attention.qkv.weight.chunk(3)["qkv".index(part)]
    return rows


def adapted(backbone: Backbone, groups: tuple[str, ...]) -> dict[int, AdaptedQKV]:
    return wrap_attention(backbone, range(DEPTH), lambda qkv: AdaptedQKV(qkv, groups))


def open_task(modules: dict[int, AdaptedQKV]) -> None:
    """Updates that are not zero, other ones in every layer and group."""
    for layer, module in modules.items():
        for number, adapter in enumerate(module.groups.values()):
            drawn = torch.Generator().manual_seed(10 * layer + number)
            basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=drawn))[0].contiguous()
            adapter.begin(0, basis, basis[:, :0])
            adapter.b.data.normal_(generator=drawn)  # type: ignore[union-attr]


@families
def test_the_final_feature_is_timms_own(family: Family) -> None:
    for architecture in architectures(family):
        backbone, images = wrapped(architecture, family), tiny_images()
        expected = timms_feature(tiny(architecture, family), images)
        torch.testing.assert_close(backbone(images)[:, :WIDTH], expected, rtol=0, atol=1e-5)
        assert float((expected - expected.roll(1, 0)).abs().max()) > 0.05, "images must matter"
        assert backbone.pooling.startswith(family.feature)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = backbone(images)
        assert 0 < float((rounded - backbone(images)).abs().max()) < 0.3
        assert torch.equal(backbone(images[:1]), backbone(images[:1])), "nothing is left of a pass"


@families
@pytest.mark.parametrize("part", "qkv")
def test_an_adapter_is_an_edit_of_timms_own_weights(family: Family, part: str) -> None:
    """So no projection finds a way around the wrapper, and none has its columns elsewhere."""
    for architecture in architectures(family):
        backbone, images = wrapped(architecture, family), tiny_images()
        plain = backbone(images)
        modules = adapted(backbone, (part,))
        assert torch.equal(backbone(images), plain), "an adapter without a task changes nothing"
        open_task(modules)
        with torch.no_grad():
            unmerged, original = backbone(images), tiny(architecture, family)
            for layer, module in modules.items():
                a, b = module.groups[part].a, module.groups[part].b
                part_of(original.blocks[layer].attn, part).add_((a @ b).T)  # type: ignore[operator]
            for module in modules.values():
                module.merge()
            merged = backbone(images)
        expected = timms_feature(original, images)
        assert float((expected - plain[:, :WIDTH]).abs().max()) > 0.01
        torch.testing.assert_close(unmerged[:, :WIDTH], expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=2e-5)
        unwrap_attention(backbone)
        assert torch.equal(backbone(images), plain)


@families
@pytest.mark.parametrize("size", [48, 24])
def test_another_image_size_is_timms_own(family: Family, size: int) -> None:
    architecture = architectures(family)[0]
    try:
        changed, known = resized(tiny(architecture, family), info(architecture), (size, size))
    except DualLoRAError as error:
        if "install a newer timm" in str(error) and Version(timm.__version__) < Version("1.0.31"):
            pytest.skip(str(error))
        raise
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = timms_feature(tiny(architecture, family, size), images)
    found = Backbone(changed, known)(images)[:, :WIDTH]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert known.input_size == (3, size, size) and known.sha256 == info(architecture).sha256
    with pytest.raises(DualLoRAError, match=f"nearest image size is {size}"):
        resized(tiny(architecture, family), info(architecture), (size + 1, size + 1))


def learned(make: Callable[[], Backbone], folder: Path, name: str, **changes: Any) -> Outputs:
    """Two tasks, saved, loaded again, and the outputs of both compared."""
    learner = ContinualLearner(make(), small_config(name, **changes), device="cpu", augment="none")
    tasks = three_tasks(4)[:2]
    for task in tasks:
        learner.learn(task)
    learner.save(folder)
    loaded = ContinualLearner.load(folder, device="cpu", backbone=make())
    data = unseen(tasks, 2)
    outputs = learner.outputs(data)
    assert_same_outputs(loaded.outputs(data), outputs)
    return outputs


@pytest.mark.slow
@families
@pytest.mark.parametrize("residual", ["none", "own"])
def test_two_tasks_are_learned_and_survive_a_folder(family: Family, residual: str, tmp_path: Path) -> None:
    architecture = architectures(family)[-1]
    outputs = learned(lambda: wrapped(architecture, family), tmp_path, "duallora", residual=residual)
    torch.testing.assert_close(outputs.heads.exp().sum(1), torch.ones(len(outputs.heads)))
    assert (outputs.gate is not None) == (residual == "own")


@pytest.mark.parametrize("name", ["lora", "inflora", "sd-lora", "slca"])
def test_other_methods_stand_on_rotary_positions_too(name: str, tmp_path: Path) -> None:
    learned(lambda: wrapped(architectures(ROTARY)[-1], ROTARY), tmp_path, name)


@families
@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda-prompt"])
def test_prompts_are_refused_where_the_table_says_so(family: Family, name: str) -> None:
    architecture = architectures(family)[0]
    config, backbone = small_config(name), wrapped(architecture, family)
    if NO_PROMPTS in family.notes:
        with pytest.raises(DualLoRAError, match=rf"{architecture} has .* positions.*prompts have no place"):
            ContinualLearner(backbone, config, device="cpu")
    else:
        learner = ContinualLearner(backbone, config, device="cpu")
        learner.learn(Patterns(["ant", "bee"], 2))
        assert learner.outputs(unseen(three_tasks()[:1], 1)).heads.isfinite().all()


@families
def test_class_token_moments_are_refused_where_the_table_says_so(family: Family) -> None:
    architecture = architectures(family)[0]
    backbone = wrapped(architecture, family)
    check_moments(backbone, "tokens")
    config = small_config("duallora", moments="class_token")
    if NO_PROMPTS in family.notes:
        with pytest.raises(DualLoRAError, match=rf"{architecture} .*--method\.moments tokens"):
            ContinualLearner(backbone, config, device="cpu")
    else:
        learner = ContinualLearner(backbone, config, device="cpu")
        learner.learn(Patterns(["ant", "bee"], 2))


@pytest.mark.parametrize("architecture", ["beit_base_patch16_224", "eva02_small_patch14_224"])
def test_timms_own_layout_would_bypass_a_wrapper_and_is_found_out(architecture: str) -> None:
    """What the probe is for: these read ``qkv.weight`` until their biases are folded into the layer."""
    family = next(f for f in TIMM if f.examples[0].name.startswith(architecture))
    model = tiny(architectures(family)[0], family)
    attentions = [block.attn for block in model.blocks]  # type: ignore[operator, union-attr]
    assert not any(calls_qkv(attention) for attention in attentions)
    Backbone(model, info(architecture))
    assert all(calls_qkv(attention) for attention in attentions)


@pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)
def test_the_table_says_what_timm_says(family: Family) -> None:
    for example in family.examples:
        if example.name not in timm.list_models(pretrained=True):
            pytest.skip(f"timm {timm.__version__} has no {example.name}")
        settings = timm.get_pretrained_cfg(example.name)
        assert settings is not None and settings.input_size == (3, example.size, example.size)
        if "device" not in inspect.signature(timm.models.VisionTransformer).parameters:
            continue  # an older timm: counting would take the memory of the whole model
        model = timm.create_model(example.name, num_classes=0, device="meta")
        assert sum(p.numel() for p in model.parameters()) == example.parameters


@pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)
def test_the_real_architectures_can_be_wrapped(family: Family) -> None:
    for architecture in architectures(family):
        model = timm.create_model(architecture, depth=1)
        backbone = Backbone(model, info(architecture))
        assert backbone.depth == 1 and backbone.pooling.startswith(family.feature)
        assert type(backbone.attention(0).qkv) is nn.Linear


def test_the_embedded_backbone_is_in_the_table() -> None:
    (example,) = FAMILIES[0].examples
    backbone = load_backbone(example.name)
    assert backbone.info.input_size[1] == example.size
    assert sum(p.numel() for p in backbone.parameters()) == example.parameters


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text()
    start = page.index("| family |")
    table = page[start : page.index("\n\n", start)].splitlines()
    assert table[2:] == [
        f"| {family.name} | {', '.join(f'`{each.name}`' for each in family.examples)} | {family.feature} | "
        f"{', '.join(dict.fromkeys(str(each.size) for each in family.examples))} | "
        f"{', '.join(dict.fromkeys(f'{each.parameters / 1e6:.1f} M' for each in family.examples))} | "
        f"{family.notes} |"
        for family in FAMILIES
    ]


def test_the_command_lists_every_example(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    backbones(json=True)
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == [e.name for family in FAMILIES for e in family.examples]
    assert {each["source"] for each in found} == {"package", "timm", "hf"}
    backbones()
    text = capsys.readouterr().out
    assert all(each["name"] in text for each in found)
