"""The script that trains the embedded backbone: recipe, resuming, and the file that it writes."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import duallora
from duallora.backbones.backbone import load_backbone
from duallora.errors import DualLoRAError
from duallora.runtime import compute as duallora_compute
from duallora.runtime.progress import Progress

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))  # where the script finds its own modules

import pretrain_backbone as script
from pretrain_images import cutmix, decode, normalised, open_data, samples, soft_targets, view_draws, views
from pretrain_recipe import MEAN, STD, Recipe, build, parameter_groups, rounded, write_backbone

EMBEDDED = Path(duallora.__file__).parent / "weights" / "vit-micro-conv-64.safetensors"
TINY = {"depth": 2, "width": 24, "heads": 2, "images": (24, 24), "sizes": (8, 16), "batch": 8, "ema": 0.5}
OPTIONS = ["--depth", "2", "--width", "24", "--heads", "2", "--images", "24,24", "--sizes", "8,16"]
OPTIONS += ["--batch", "8", "--ema", ".5", "--cutmix", "1", "--device", "cpu"]
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def fp32_and_own_draws(monkeypatch):
    monkeypatch.setattr(duallora_compute, "_computes_in_bf16", lambda device: False)
    with torch.random.fork_rng(devices=[]):
        yield


def write_data(folder: Path, size: int = 16) -> Path:
    """Two classes, one bright above and one below; 11 training images, so that batches cross epochs."""
    random = np.random.default_rng(0)
    for part, count in (("train", 11), ("val", 6)):
        for index in range(count):
            pixels = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
            bright = slice(0, size // 2) if index % 2 else slice(size // 2, size)
            pixels[bright] += 120
            path = folder / part / ("above" if index % 2 else "below") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def new_training(data: Path, **changes: object):
    recipe = Recipe(**TINY | {"cutmix": 0.5} | changes)
    pixels, labels = decode(open_data(data)[0], recipe.side, QUIET, "")
    return script.Training(recipe, pixels, labels, Fabric(accelerator="cpu", devices=1))


def test_the_defaults_are_the_recipe_of_the_model_card() -> None:
    recipe = Recipe()
    assert recipe.steps * recipe.batch == pytest.approx(1_520_000, rel=1e-3)
    assert recipe.size_at(0) == recipe.size_at(7968) == 48
    assert recipe.size_at(7969) == recipe.size_at(recipe.steps - 1) == 64
    rates = [recipe.rate_at(step) for step in range(recipe.steps)]
    top = rates.index(max(rates))
    assert max(rates) == 2e-3 and top / recipe.steps == pytest.approx(0.05, abs=1e-3)
    assert rates[0] < 1e-5 and rates[-1] < 1e-9
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_default_architecture_is_the_embedded_one() -> None:
    with safe_open(EMBEDDED, framework="pt") as file:
        wanted = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not iterable)
    built = rounded(build(Recipe(), 100).state_dict())
    assert {key: (t.shape, t.dtype) for key, t in built.items()} == {
        key: (t.shape, t.dtype) for key, t in wanted.items()
    }


@pytest.mark.slow
def test_an_interrupted_training_equals_an_uninterrupted_one(data: Path, tmp_path: Path, capsys) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert script.main([str(data), "--out", str(whole), *OPTIONS]) == 0
    assert "top-1" in capsys.readouterr().out
    for step in range(1, 6):  # no time at all still makes one step
        assert script.main([str(data), "--out", str(pieces), *OPTIONS, "--minutes", "0"]) == 0
        assert f"step {step} of 6; run the same command again" in capsys.readouterr().out
        assert not (pieces / "backbone.safetensors").exists()
    assert script.main([str(data), "--out", str(pieces), *OPTIONS]) == 0
    for name in ("state.safetensors", "backbone.safetensors"):
        first, second = load_file(whole / name), load_file(pieces / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert sorted(path.name for path in pieces.iterdir()) == [
        ".lock",
        "backbone.safetensors",
        "state.safetensors",
    ]


def test_a_finished_training_writes_its_weights_again(data: Path, tmp_path: Path, capsys) -> None:
    command = [str(data), "--out", str(tmp_path), *OPTIONS]
    assert script.main(command) == 0
    file = tmp_path / "backbone.safetensors"
    before, said = file.read_bytes(), capsys.readouterr().out
    file.unlink()
    assert script.main(command) == 0
    assert (file.read_bytes(), capsys.readouterr().out) == (before, said)


def test_other_options_do_not_go_on(data: Path, tmp_path: Path, capsys) -> None:
    command = [str(data), "--out", str(tmp_path), *OPTIONS, "--minutes", "0"]
    assert script.main(command) == 0
    before = (tmp_path / "state.safetensors").read_bytes()
    assert script.main([*command, "--seed", "1", "--weight-decay", ".1"]) == 2
    assert "differs in weight_decay, seed; repeat its options" in capsys.readouterr().err
    assert (tmp_path / "state.safetensors").read_bytes() == before
    (tmp_path / "state.safetensors").write_bytes(before[:100])
    assert script.main(command) == 2
    assert "state.safetensors is no state of this script; delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_separable_set_is_learned(data: Path) -> None:
    changes = {"images": (160, 160), "label_smoothing": 0.0, "cutmix": 0.2, "learning_rate": 5e-3}
    training = new_training(data, **changes, ema=0.8, drop_path=0.0)
    losses = [float(training.step()) for _ in range(training.recipe.steps)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    training.model.load_state_dict(rounded(training.average))
    held_out = decode(open_data(data)[1], 16, QUIET, "")
    assert script.top1(training.model, *held_out, torch.device("cpu")) == 1


def test_the_average_follows_the_weights(data: Path) -> None:
    training = new_training(data, ema=0.75)
    wanted = {name: tensor.clone().double() for name, tensor in training.average.items()}
    for _ in range(3):
        training.step()
        for name, tensor in training.weights.items():
            wanted[name] = 0.75 * wanted[name] + 0.25 * tensor.double()
    for name, tensor in training.average.items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 3
        else:
            torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_not_saved(data: Path) -> None:
    training = new_training(data)
    with torch.no_grad():
        training.model.head.weight.fill_(math.nan)
    with pytest.raises(DualLoRAError, match="lower --learning-rate"):
        script.train(training, lambda: pytest.fail("saved"), QUIET, until=time.monotonic())


def test_a_written_file_is_a_backbone(tmp_path: Path) -> None:
    recipe = Recipe(sizes=(24, 32))
    model = build(recipe, 3).eval()
    weights = rounded(model.state_dict())
    write_backbone(tmp_path / "own.safetensors", weights, recipe, ["a", "b", "c"])
    backbone = load_backbone("embedded", tmp_path / "own.safetensors")
    assert backbone.info.input_size == (3, 32, 32)
    assert (backbone.info.mean, backbone.info.std) == (MEAN, STD)
    model.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images)[:, :192], wanted, atol=1e-5, rtol=1e-5)
    with (
        safe_open(tmp_path / "own.safetensors", "pt") as file,
        safe_open(EMBEDDED, "pt") as embedded,
    ):
        own, packaged = file.metadata(), embedded.metadata()
    assert own["head_classes"] == "a,b,c"
    same_size = own["architecture"].replace("img_size=32", "img_size=64").replace("(4, 4)", "(8, 8)")
    assert same_size.replace("num_classes=3", "num_classes=100") == packaged["architecture"]
    assert own.keys() == packaged.keys()
    assert all(own[key] == packaged[key] for key in ("mean", "std"))


def test_soft_targets() -> None:
    labels, classes, smoothing, share = [2, 0, 0], 4, 0.2, 0.7
    for row, label in enumerate(labels):
        for column in range(classes):
            wanted = smoothing / classes + (1 - smoothing) * share * (column == label)
            wanted += (1 - smoothing) * (1 - share) * (column == labels[row - 1])
            found = soft_targets(torch.tensor(labels), classes, smoothing, share)[row, column]
            assert float(found) == pytest.approx(wanted)
    logits = torch.randn(3, classes)
    smoothed = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=smoothing)
    whole = soft_targets(torch.tensor(labels), classes, smoothing)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, whole), smoothed)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_one_box(seed: int) -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 10, 10)
    mixed, share = cutmix(images, Random(seed))
    pasted = mixed[1, 0] == 0
    for row in range(3):
        assert torch.equal(mixed[row] == float((row - 1) % 3), pasted.expand(3, 10, 10))
        assert torch.equal(mixed[row] == float(row), ~pasted.expand(3, 10, 10))
    assert share == pytest.approx(1 - pasted.float().mean().item())
    box = torch.outer(pasted.any(1), pasted.any(0))
    assert torch.equal(pasted, box)


def test_cutmix_takes_its_share_of_the_batches_and_ends_early(data: Path) -> None:
    training = new_training(data, images=(800, 800), cutmix=0.25, label_smoothing=0.0)
    mixed = []
    for step in range(training.recipe.steps):
        training.done = step
        mixed.append(bool(((training.batch()[1] % 1) != 0).any()))
    early = mixed[: int(0.85 * len(mixed))]
    assert 0.1 < np.mean(early) < 0.35 and not any(mixed[len(early) :])


def test_every_epoch_shows_all_images_in_another_order() -> None:
    recipe = Recipe(batch=8)
    seen = [sample for step in range(11) for sample in samples(recipe, step, 11)]
    orders = [[index for epoch, index in seen if epoch == wanted] for wanted in range(8)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1]
    assert samples(recipe, 3, 11) == seen[24:32]
    assert samples(Recipe(batch=8, seed=1), 0, 11) != seen[:8]


def test_views_are_crops_flips_and_colours() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    wanted = normalised(pixels.float() / 255)
    plain = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    def view(size: int = 16, **changes: float) -> torch.Tensor:
        names = ("left", "top", "width", "height", "mirror", "saturation", "brightness")
        draws = [changes.get(name, value) for name, value in zip(names, plain, strict=True)]
        return views(pixels, torch.tensor([draws]), size)

    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(view(), wanted, **close)
    torch.testing.assert_close(view(mirror=-1.0), wanted.flip(3), **close)
    corner = view(8, left=0.25, top=0.5, width=0.5, height=0.5)
    torch.testing.assert_close(corner, wanted[:, :, 8:, 4:12], **close)
    dark = normalised(pixels.float() / 255 * 0.7)
    torch.testing.assert_close(view(brightness=0.7), dark, **close)
    grey = view(saturation=0.0) * torch.tensor(STD).view(3, 1, 1)
    grey += torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], **close)


def test_draws_keep_to_the_recipe() -> None:
    draws = np.array([view_draws(0, epoch, index) for epoch in range(20) for index in range(100)])
    left, top, width, height, mirror, saturation, brightness = draws.T
    assert 0.35 <= (width * height).min() < 0.37 and (width * height).max() <= 1
    assert (np.abs(np.log(width / height)) <= np.log(4 / 3) + 1e-9).all()
    assert (left >= 0).all() and (top >= 0).all() and (left + width).max() <= 1 and (top + height).max() <= 1
    assert abs(mirror.mean()) < 0.1
    for factor in (saturation, brightness):
        assert 0.7 <= factor.min() < 0.71 and 1.29 < factor.max() <= 1.3
    assert abs(np.corrcoef(saturation, brightness)[0, 1]) < 0.1
    assert len(np.unique(left)) == len(draws)


def test_weight_decay_is_for_matrices_and_kernels() -> None:
    model = build(Recipe(**TINY), 2)
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        name
        for name, parameter in model.named_parameters()
        if name in ("cls_token", "pos_embed") or parameter.ndim == 1
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_bad_data_is_one_sentence(data: Path, tmp_path: Path, capsys) -> None:
    def refusal(folder: Path) -> str:
        assert script.main([str(folder), "--out", str(tmp_path / "out"), *OPTIONS]) == 2
        assert not (tmp_path / "out").exists()
        text = capsys.readouterr().err
        assert text.startswith("pretrain_backbone: ") and text.count("\n") == 1
        return text

    assert "has no folder train/; DATA holds train/ and val/" in refusal(tmp_path / "nothing")
    own = write_data(tmp_path / "own")
    (own / "val" / "above").rename(own / "val" / "beside")
    assert "hold different classes; give both the same" in refusal(own)
    (own / "val" / "beside").rename(own / "val" / "above")
    (own / "train" / "above" / "1.png").write_bytes(b"no image")
    assert "1.png is not an image in a known format: repair or remove it" in refusal(own)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 0}, "above zero"),
        ({"images": (10,)}, "one number for each part"),
        ({"sizes": (8, 20)}, "multiples of 8"),
        ({"sizes": (16, 8)}, "the last one the largest"),
        ({"heads": 5}, "multiple of --heads"),
        ({"ema": 1.0}, "below 1"),
        ({"cutmix": 1.5}, "--cutmix"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(DualLoRAError, match=sentence):
        Recipe(**TINY | changes)


def test_help_names_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in ("--drop-path", "(default: 1020000,500000)", "(default: 0.999)", "--minutes", "15 %"):
        assert expected in text
