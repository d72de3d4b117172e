"""The evaluation transform equals timm's; the augmentation depends on its key alone."""

from __future__ import annotations

import math
import pickle
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from duallora.data.transforms import Augmentation, evaluation_transform
from duallora.errors import DualLoRAError


@dataclass(frozen=True)
class Info:
    """The part of a backbone's description that the transforms read."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    input_size: tuple[int, int, int] = (3, 64, 64)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"


INFO: Any = Info()


def picture(width: int = 80, height: int = 64, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(64, 64), (80, 64), (63, 200), (10, 7), (301, 224)])
@pytest.mark.parametrize(("side", "share"), [(64, 1.0), (32, 0.9), (48, 0.875)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_timm(size: tuple[int, int], side: int, share: float, interpolation: str) -> None:
    info: Any = Info(input_size=(3, side, side), crop_pct=share, interpolation=interpolation)
    theirs = create_transform(
        info.input_size, mean=info.mean, std=info.std, interpolation=interpolation, crop_pct=share
    )
    image = picture(*size)
    ours = evaluation_transform(info)(image)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.allclose(ours, theirs(image), atol=2e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 1), (3, 2)])
@pytest.mark.parametrize("policy", ["crop,flip", "crop", "crop=0.05,flip", "flip", "none"])
def test_any_shape_gives_the_input_size(size: tuple[int, int], policy: str) -> None:
    image = Image.new("RGB", size, "white")
    info: Any = Info(crop_pct=0.9)
    expected = ((1 - torch.tensor(info.mean)) / torch.tensor(info.std)).reshape(3, 1, 1).expand(3, 64, 64)
    assert torch.allclose(Augmentation(info, policy)(image, 0, 0), expected, atol=1e-5)


def test_rectangular_input() -> None:
    info: Any = Info(input_size=(3, 32, 48), crop_pct=0.9)
    for size in [(100, 20), (20, 100), (48, 32)]:
        assert evaluation_transform(info)(picture(*size)).shape == (3, 32, 48)
        assert Augmentation(info)(picture(*size), 0, 0).shape == (3, 32, 48)


def test_none_is_the_evaluation_transform() -> None:
    view = Augmentation(INFO, "none", seed=3, task=2)(picture(), epoch=5, index=7)
    assert torch.equal(view, evaluation_transform(INFO)(picture()))


@pytest.mark.parametrize(
    "policy", ["", "crop,crop", "crop=0", "crop=2", "crop=x", "flip,flip", "none,crop", "cut"]
)
def test_other_policies_are_refused(policy: str) -> None:
    with pytest.raises(DualLoRAError, match=r"unknown augmentation .* give crop"):
        Augmentation(INFO, policy)


def test_a_smaller_share_keeps_less_of_the_image() -> None:
    ramp = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).convert("RGB")

    def contrast(policy: str) -> float:
        views = [Augmentation(INFO, policy)(ramp, 0, index)[0].std() for index in range(40)]
        return float(sum(views)) / 40

    whole = Augmentation(INFO, "flip")
    plain = Augmentation(INFO, "none")(ramp, 0, 0)
    mirrored = [index for index in range(20) if not torch.equal(whole(ramp, 0, index), plain)]
    assert 4 < len(mirrored) < 16
    assert all(torch.allclose(whole(ramp, 0, i), plain.flip(2), atol=1e-5) for i in mirrored)
    assert torch.equal(Augmentation(INFO, "crop=0.6")(ramp, 0, 1), Augmentation(INFO, "crop")(ramp, 0, 1))
    assert contrast("crop=0.02") != pytest.approx(contrast("crop"), rel=1e-3)


@pytest.mark.parametrize("policy", ["crop,flip", "crop"])
def test_a_view_depends_on_its_key_alone(policy: str) -> None:
    augment = Augmentation(INFO, policy, seed=1, task=2)
    wanted = augment(picture(), epoch=3, index=4)
    random.seed(99)
    torch.manual_seed(99)
    for index in range(5):
        augment(picture(seed=index), epoch=0, index=index)
    before = random.getstate()
    assert torch.equal(Augmentation(INFO, policy, seed=1, task=2)(picture(), epoch=3, index=4), wanted)
    assert random.getstate() == before
    others = [
        augment(picture(), epoch=4, index=4),
        augment(picture(), epoch=3, index=5),
        replace(augment, seed=2)(picture(), epoch=3, index=4),
        replace(augment, task=3)(picture(), epoch=3, index=4),
    ]
    assert not any(torch.equal(view, wanted) for view in others)


def test_draws_are_the_same_on_every_machine() -> None:
    # A ramp to the right: the first and the last column say where the crop lay and whether it was mirrored.
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    info: Any = Info(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
    augment = Augmentation(info, "crop,flip", seed=0, task=0)
    rows = [(augment(ramp, 0, index)[0, 0] * 255).round().int().tolist() for index in range(4)]
    assert [(row[0], row[-1]) for row in rows] == [(23, 246), (17, 246), (10, 199), (245, 7)]


def test_crops_keep_their_share_and_half_are_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    info: Any = Info(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
    rows = [Augmentation(info)(ramp, 0, index)[0, 0] * 255 for index in range(400)]
    widths = torch.stack([(row[-1] - row[0]).abs() for row in rows])
    mirrored = sum(bool(row[0] > row[-1]) for row in rows)
    assert 160 < mirrored < 240
    # Area from .6, ratio from 3/4: the narrowest crop is sqrt(.6 * 3/4) = .67 wide.
    assert widths.min() >= 64
    assert widths.max() > 90
    assert not any(
        row[0] > row[-1] for row in (Augmentation(info, "crop")(ramp, 0, i)[0, 0] for i in range(50))
    )


def test_transforms_can_be_sent_to_workers() -> None:
    evaluate = pickle.loads(pickle.dumps(evaluation_transform(INFO)))
    assert torch.equal(evaluate(picture()), evaluation_transform(INFO)(picture()))
    augment = pickle.loads(pickle.dumps(Augmentation(INFO)))
    assert torch.equal(augment(picture(), 0, 1), Augmentation(INFO)(picture(), 0, 1))


def test_tensors_and_paths_are_taken(tmp_path: Any) -> None:
    image = picture()
    image.save(tmp_path / "image.png")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for other in (tensor, tensor.float() / 255, tmp_path / "image.png"):
        assert torch.equal(evaluation_transform(INFO)(other), evaluation_transform(INFO)(image))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DualLoRAError, match="give crop"):
        Augmentation(INFO, "mixup")
    info: Any = Info(interpolation="magic")
    with pytest.raises(DualLoRAError, match="valid are nearest, bilinear"):
        evaluation_transform(info)


def test_augmentation_is_cheap() -> None:
    augment, image = Augmentation(INFO), picture(64, 64)
    seconds = []
    for _ in range(3):
        start = time.process_time()  # others may keep the processor busy
        for index in range(200):
            augment(image, 0, index)
        seconds.append((time.process_time() - start) / 200)
    assert min(seconds) < 2e-3  # usually below 1e-4; the bound leaves room for a slow machine


def test_squash_resizes_without_keeping_the_aspect_ratio() -> None:
    info: Any = Info(input_size=(3, 8, 8), crop_pct=1.0, crop_mode="squash")
    picture = Image.new("RGB", (32, 8), "black")
    picture.paste("white", (0, 0, 8, 8))  # the left quarter
    view = evaluation_transform(info)(picture)
    assert view[0, :, 0].min() > view[0, :, -1].max()  # a centre crop would have cut it off
    cropped: Any = Info(input_size=(3, 8, 8), crop_pct=1.0)
    assert evaluation_transform(cropped)(picture)[0].std() < 1e-6


def test_an_unknown_crop_mode_is_refused() -> None:
    info: Any = Info(crop_mode="border")
    with pytest.raises(DualLoRAError, match="center, squash"):
        evaluation_transform(info)


@pytest.mark.parametrize("size", [(560, 70), (700, 70), (70, 900), (1300, 30), (3, 1000), (6000, 20)])
@pytest.mark.parametrize("share", [1.0, 0.875])
def test_a_strip_is_prepared_as_the_recipe_says(size: tuple[int, int], share: float) -> None:
    """Resize, centre crop, mean, std: what an exported model's metadata says, however long the image is."""
    info: Any = Info(crop_pct=share)
    width, height = size
    values = np.arange(width)[None] * 5 + np.arange(height)[:, None] * 3
    picture = Image.fromarray(
        np.stack([values % 256, values // 2 % 256, 255 - values % 256], 2).astype(np.uint8)
    )
    side = info.input_size[1]
    scaled = math.floor(side / share)
    whole = (
        (int(scaled * width / height), scaled) if width >= height else (scaled, int(scaled * height / width))
    )
    left, upper = round((whole[0] - side) / 2), round((whole[1] - side) / 2)
    box = (left, upper, left + side, upper + side)
    expected = np.asarray(picture.resize(whole, Image.Resampling.BICUBIC).crop(box), np.float32) / 255
    expected = (expected - np.float32(info.mean)) / np.float32(info.std)
    found = evaluation_transform(info)(picture).numpy().transpose(1, 2, 0)
    assert np.abs(found - expected).mean() < 2e-3
    assert np.abs(found - expected).max() < 2.5 / 255 / min(info.std)


def test_a_very_long_strip_is_never_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        made.append(size)
        return plain(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert evaluation_transform(INFO)(Image.new("RGB", (300_000, 1))).shape == (3, 64, 64)
    assert made == [(64, 64)]
