"""Hugging Face ViTs: the features of transformers, from the files that it writes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tasks import assert_same_outputs, small_config, three_tasks, unseen
from tiny import IMAGE, WIDTH, tiny_images
from torch import nn

from duallora import ContinualLearner, DualLoRAError
from duallora.backbones.backbone import BackboneInfo, load_backbone
from duallora.backbones.catalog import FAMILIES
from duallora.backbones.hf_files import DEFAULTS, preparation, read_config
from duallora.backbones.hf_vit import build

transformers = pytest.importorskip("transformers", minversion="4.50")
pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")

_SIZE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": 8,
}
_OLD, _DINO = _SIZE | {"intermediate_size": 72}, _SIZE | {"mlp_ratio": 3}
# Class of the configuration, class of the model, fields beside the sizes.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", _OLD),
    "vit-classifier": ("ViTConfig", "ViTForImageClassification", _OLD),
    "vit-tanh-no-bias": ("ViTConfig", "ViTModel", _OLD | {"hidden_act": "gelu_new", "qkv_bias": False}),
    "vit-masked": ("ViTConfig", "ViTForMaskedImageModeling", _OLD),
    "deit": ("DeiTConfig", "DeiTModel", _OLD),
    "deit-teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", _OLD),
    "dinov2": ("Dinov2Config", "Dinov2Model", _DINO),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2Model", _DINO | {"use_swiglu_ffn": True}),
    "dinov2-classifier": ("Dinov2Config", "Dinov2ForImageClassification", _DINO),
    "dinov2-registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", _DINO),
}
FEW = ("vit", "deit", "dinov2-registers")


def model_of(case: str) -> Any:
    """With large weights: at the usual ones attention is uniform, and hardly any projection matters."""
    config, kind, fields = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        for name, parameter in model.named_parameters():
            if "norm" not in name and "lambda1" not in name:
                nn.init.normal_(parameter, std=0.2)
            elif "lambda1" in name:
                nn.init.uniform_(parameter, 0.3, 0.7)
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    for case in CASES:
        model_of(case).save_pretrained(root / case)
    return {case: root / case for case in CASES}


def base(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model)


def expected(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The class token after the last norm, of DeiT its mean with the distillation token."""
    settings = {} if "dinov2" in model.config.model_type else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        tokens: torch.Tensor = base(model)(images, **settings).last_hidden_state
    return tokens[:, :2].mean(1) if model.config.model_type == "deit" else tokens[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_the_final_feature_is_that_of_transformers(case: str, folders: dict[str, Path]) -> None:
    backbone, images = load_backbone(f"hf:{folders[case]}"), tiny_images()
    want = expected(model_of(case), images)
    torch.testing.assert_close(backbone(images)[:, :WIDTH], want, rtol=0, atol=1e-5)
    assert float((want - want.roll(1, 0)).abs().max()) > 0.05, "images must matter"
    assert backbone.info.file == str(folders[case] / "model.safetensors")
    assert backbone.info.input_size == (3, IMAGE, IMAGE) and backbone.positions == "absolute"


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "dinov2-registers"])
def test_positions_are_resampled_as_transformers_does(case: str, size: int, folders: dict[str, Path]) -> None:
    backbone = load_backbone(f"hf:{folders[case]}", image_size=size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        backbone(images)[:, :WIDTH], expected(model_of(case), images), rtol=0, atol=1e-5
    )
    assert backbone.info.sha256 == load_backbone(f"hf:{folders[case]}").info.sha256
    with pytest.raises(DualLoRAError, match=f"8 x 8 patches of hf:.*nearest image size is {size}"):
        load_backbone(f"hf:{folders[case]}", image_size=size + 3)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("part", "qkv")
def test_an_adapter_is_an_edit_of_the_weights_of_transformers(
    case: str, part: str, folders: dict[str, Path]
) -> None:
    backbone, images, original = load_backbone(f"hf:{folders[case]}"), tiny_images(), model_of(case)
    plain = backbone(images)
    word = {"q": "query", "k": "key", "v": "value"}[part]
    old = [(name, module) for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    projections = [m for name, m in old if name.endswith((f".{part}_proj", f"attention.attention.{word}"))]
    assert len(projections) == backbone.depth
    with torch.no_grad():
        for layer, module in enumerate(projections):
            drawn = torch.Generator().manual_seed(layer)
            delta = 0.3 * torch.randn(WIDTH, WIDTH, generator=drawn)
            module.weight += delta
            backbone.attention(layer).get_submodule("qkv").weight.chunk(3)["qkv".index(part)].add_(delta)
    want = expected(original, images)
    assert float((want - plain[:, :WIDTH]).abs().max()) > 0.01
    torch.testing.assert_close(backbone(images)[:, :WIDTH], want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("residual", ["none", "own"])
def test_two_tasks_are_learned_and_survive_the_loss_of_the_folder(
    case: str, residual: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(folders[case], tmp_path / "source")
    learner = ContinualLearner(
        load_backbone(f"hf:{source}", image_size=24, normalization="imagenet"),
        small_config(residual=residual),
        device="cpu",
    )
    for task in three_tasks(4)[:2]:
        learner.learn(task)
    learner.save(tmp_path / "model")
    shutil.rmtree(source)
    manifest = json.loads((tmp_path / "model" / "model.json").read_text())
    (copy,) = (tmp_path / "model").glob("backbone-*.safetensors")
    stored = BackboneInfo.from_dict(manifest["backbone"])
    again = load_backbone(stored, copy)
    assert again.info == replace(learner.backbone.info, file=str(copy))
    loaded = ContinualLearner.load(tmp_path / "model", device="cpu", backbone=again)
    data = unseen(three_tasks()[:2], 2)
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))


@pytest.mark.parametrize("name", ["coda-prompt", "dualprompt", "l2p", "inflora"])
def test_prompts_find_the_attention_they_know(name: str, folders: dict[str, Path]) -> None:
    learner = ContinualLearner(load_backbone(f"hf:{folders['deit']}"), small_config(name), device="cpu")
    learner.learn(three_tasks(2)[0])
    assert learner.outputs(unseen(three_tasks()[:1], 1)).heads.isfinite().all()
    moments = small_config(moments="class_token")
    ContinualLearner(load_backbone(f"hf:{folders['vit']}"), moments, device="cpu").learn(three_tasks(2)[0])


def test_random_weights_need_no_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["vit"] / "config.json", tmp_path)
    first, second = (load_backbone(f"hf:{tmp_path}", pretrained=False) for _ in range(2))
    assert first.info == second.info and torch.equal(first(tiny_images()), second(tiny_images()))
    with pytest.raises(DualLoRAError, match=r"has no model.safetensors; save the model there"):
        load_backbone(f"hf:{tmp_path}")


def test_half_precision_is_widened(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["vit"] / "config.json", tmp_path)
    whole = load_file(folders["vit"] / "model.safetensors")
    save_file({key: x.bfloat16() for key, x in whole.items()}, tmp_path / "model.safetensors")
    backbone = load_backbone(f"hf:{tmp_path}")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


PROCESSORS = [
    # As transformers writes it for ViT, DeiT and DINOv2, and as it did for ViT in its first versions.
    (
        {"size": {"height": 24, "width": 24}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ((3, 24, 24), "bilinear", 1.0, "squash"),
    ),
    (
        {
            "size": {"height": 37, "width": 37},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "resample": 3,
            "image_mean": [0.4] * 3,
        },
        ((3, 32, 32), "bicubic", 32 / 37, "squash"),
    ),
    (
        {
            "size": {"shortest_edge": 45},
            "do_center_crop": True,
            "crop_size": {"height": 40, "width": 40},
            "resample": 3,
        },
        ((3, 40, 40), "bicubic", 40 / 45, "center"),
    ),
    ({"size": 32, "resample": 2}, ((3, 32, 32), "bilinear", 1.0, "squash")),
    ({"size": {"shortest_edge": 31}}, ((3, 32, 32), "bilinear", 1.0, "center")),  # 31: no whole patches
]


@pytest.mark.parametrize(("processor", "found"), PROCESSORS)
def test_images_are_prepared_as_the_processor_says(
    processor: dict[str, Any], found: tuple[Any, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    info = load_backbone(f"hf:{folder}").info
    size, interpolation, crop_pct, crop_mode = found
    assert (info.input_size, info.interpolation, info.crop_mode) == (size, interpolation, crop_mode)
    assert info.crop_pct == pytest.approx(crop_pct)
    assert info.mean == tuple(processor.get("image_mean", [0.5] * 3))


def test_a_scale_other_than_bytes_goes_into_mean_and_std() -> None:
    config = {"model_type": "vit", "image_size": 32, "patch_size": 8}
    doubled = preparation(
        config, {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}
    )
    assert doubled["mean"] == pytest.approx((0.5,) * 3) and doubled["std"] == pytest.approx((0.25,) * 3)
    plain = preparation(config, {"do_normalize": False})
    assert plain["mean"] == (0.0,) * 3 and plain["std"] == (1.0,) * 3


def test_a_resize_loses_no_pixel() -> None:
    for edge in range(8, 600):
        for side in range(8, edge + 1, 8):
            config = {"model_type": "dinov2", "image_size": 32, "patch_size": 8}
            crop = {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": side}
            assert math.floor(side / preparation(config, crop)["crop_pct"]) == edge


def damaged(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "beit"}, "type 'beit'.*beit_base_patch16_224.in22k_ft_in22k of timm"),
        ({"model_type": "swin"}, "type 'swin' and cannot carry adapters: .*vit, deit, dinov2"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"num_channels": 1}, "1 channels"),
        ({"head_dim": 4}, "width of its heads"),
        ({"image_size": [32, 16]}, "not square"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in its config.json is 0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps in its config.json is 'small'"),
        ({"patch_size": "8x8"}, "says patch_size '8x8', which is none"),
        ({"image_size": [32, 0]}, r"says image_size \[32, 0\]"),
        ({"num_hidden_layers": 4}, r"encoder.layer.3.* is missing"),
        ({"num_hidden_layers": 2}, r"encoder.layer.2.* is unknown"),
        ({"intermediate_size": 64}, r"blocks.0.mlp.fc1.* is \(72"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    fields: dict[str, Any], reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = damaged(shutil.copytree(folders["vit"], tmp_path / "vit"), **fields)
    with pytest.raises(DualLoRAError, match=reason) as caught:
        load_backbone(f"hf:{folder}")
    assert "\n" not in str(caught.value) and f"hf:{folder}" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{"), ("config.json", "[]"), ("preprocessor_config.json", '{"size": {"height": null}}')],
)
def test_damaged_files_are_one_sentence(
    file: str, content: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / file).write_text(content)
    with pytest.raises(DualLoRAError, match=rf"{file}.*fetch it again"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize("name", ["hf:", "hf:nowhere", "hf:../nowhere", "hf:a/b/c"])
def test_what_is_neither_folder_nor_name_is_said(name: str) -> None:
    with pytest.raises(DualLoRAError, match=r"There is no folder .*hf:OWNER/NAME"):
        load_backbone(name)


def test_a_name_and_a_file_exclude_each_other(folders: dict[str, Path]) -> None:
    with pytest.raises(DualLoRAError, match="leave --backbone-file out"):
        load_backbone(f"hf:{folders['vit']}", folders["vit"] / "model.safetensors")


def from_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client, with a folder for the hub."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository: str, file: str) -> str:
        if repository != "someone/some-vit":
            raise OSError("name or service not known\nretry 5 of 5")
        if not (folder / file).exists():
            raise EntryNotFoundError(f"no {file}")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_download_stays_in_the_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    from_hub(folder, monkeypatch)
    info = load_backbone("hf:someone/some-vit").info
    assert (info.name, info.file) == ("hf:someone/some-vit", None)
    assert info.sha256 == load_backbone(f"hf:{folder}").info.sha256
    stored = BackboneInfo.from_dict(json.loads(json.dumps(info.to_dict())))
    damaged(folder, layer_norm_eps=1.0)  # what decides about the model is stored with it
    assert load_backbone(stored).info == info
    (folder / "model.safetensors").unlink()
    with pytest.raises(DualLoRAError, match=r"has no model\.safetensors; load it with transformers"):
        load_backbone("hf:someone/some-vit")


def test_a_failed_download_says_what_to_fetch(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_hub(folders["vit"], monkeypatch)
    with pytest.raises(
        DualLoRAError, match=r"could not be downloaded.*fetch config.json.*hf:FOLDER"
    ) as caught:
        load_backbone("hf:someone/else")
    assert "\n" not in str(caught.value) and "someone/else/tree/main" in str(caught.value)


def test_the_table_counts_what_is_built() -> None:
    """At the configurations of the hub, which differ from the defaults of their kind in these fields."""
    fields: dict[str, dict[str, Any]] = {
        "hf:google/vit-base-patch16-224-in21k": {"model_type": "vit"},
        "hf:facebook/deit-base-distilled-patch16-224": {"model_type": "deit"},
        "hf:facebook/dinov2-base": {"model_type": "dinov2"},
        "hf:facebook/dinov2-with-registers-base": {"model_type": "dinov2_with_registers", "patch_size": 14},
    }
    table = {e.name: e for family in FAMILIES if family.source == "hf" for e in family.examples}
    assert table.keys() == fields.keys()
    for name, example in table.items():
        config = DEFAULTS[fields[name]["model_type"]] | fields[name]
        with torch.device("meta"):
            model = build(config, (example.size, example.size), name)
        assert sum(p.numel() for p in model.parameters()) == example.parameters, name


def test_only_what_decides_is_stored(folders: dict[str, Path]) -> None:
    info = load_backbone(f"hf:{folders['dinov2']}").info
    assert info.config == read_config(f"hf:{folders['dinov2']}")
    assert "initializer_range" not in info.config and info.config["model_type"] == "dinov2"
