"""Other colours of training views: keyed by the sample, within what pixels can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duallora.backbones.backbone import load_backbone
from duallora.data import colours
from duallora.data.colours import Colours
from duallora.data.transforms import Augmentation


@pytest.fixture(scope="module")
def crops() -> Augmentation:
    return Augmentation(load_backbone("embedded").info, "crop", seed=3, task=1)


def views(crops: Augmentation, count: int = 4) -> torch.Tensor:
    pixels = torch.randint(256, (count, 5, 6, 3), generator=torch.Generator().manual_seed(0)).byte()
    return crops._evaluation.normalized(pixels)


def pixels_of(crops: Augmentation, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in (crops.info.mean, crops.info.std))
    return images * std + mean


def test_a_view_depends_on_its_sample_and_epoch_alone(crops):
    change, images = Colours(crops), views(crops)
    whole = change(images, [7, 8, 9, 10], 2)
    alone = change(images[2:3], [9], 2)
    assert torch.allclose(whole[2:3], alone, atol=1e-6)
    assert not torch.allclose(change(images[2:3], [9], 3), alone, atol=1e-3)
    assert not torch.allclose(change(images[2:3], [8], 2), alone, atol=1e-3)


@pytest.mark.parametrize("field", ["seed", "task"])
def test_other_seeds_and_tasks_draw_other_colours(crops, field):
    other = replace(crops, **{field: getattr(crops, field) + 1})
    assert Colours(crops).factors(0, 0) != Colours(other).factors(0, 0)


def test_passes_without_an_epoch_are_left_alone(crops):
    images = views(crops)
    assert Colours(crops)(images, range(4), None) is images


def test_values_stay_what_pixels_can_be(crops):
    found = pixels_of(crops, Colours(crops)(views(crops, 64), range(64), 0))
    assert found.min() > -1e-5 and found.max() < 1 + 1e-5


def test_factors_lie_within_their_limits_and_use_them(crops):
    drawn = torch.tensor([Colours(crops).factors(0, index) for index in range(300)])
    change, turn = colours.LARGEST_CHANGE, 2 * torch.pi * colours.LARGEST_TURN
    assert (drawn[:, :3] - 1).abs().max() <= change and drawn[:, 3].abs().max() <= turn
    assert (drawn[:, :3] - 1).abs().amax(0).min() > 0.9 * change and drawn[:, 3].abs().max() > 0.9 * turn
    assert (drawn[:, :3].mean(0) - 1).abs().max() < 0.1


def only(monkeypatch, *factors: float):
    monkeypatch.setattr(Colours, "factors", lambda self, epoch, index: factors)


def test_without_a_change_views_are_as_they_were(crops, monkeypatch):
    only(monkeypatch, 1.0, 1.0, 1.0, 0.0)
    assert torch.allclose(Colours(crops)(views(crops), range(4), 0), views(crops), atol=1e-5)


def test_brightness_multiplies(crops, monkeypatch):
    only(monkeypatch, 0.5, 1.0, 1.0, 0.0)
    found = pixels_of(crops, Colours(crops)(views(crops), range(4), 0))
    assert torch.allclose(found, pixels_of(crops, views(crops)) / 2, atol=1e-5)


def test_without_saturation_all_is_grey(crops, monkeypatch):
    only(monkeypatch, 1.0, 1.0, 0.0, 0.0)
    found = pixels_of(crops, Colours(crops)(views(crops), range(4), 0))
    assert torch.allclose(found[:, 0], found[:, 1], atol=1e-5) and torch.allclose(
        found[:, 1], found[:, 2], atol=1e-5
    )


def test_without_contrast_an_image_is_one_grey(crops, monkeypatch):
    only(monkeypatch, 1.0, 0.0, 1.0, 0.0)
    found = pixels_of(crops, Colours(crops)(views(crops), range(4), 0))
    assert found.flatten(1).std(1).max() < 1e-5


def test_a_third_of_a_turn_changes_red_into_another_colour_as_bright(crops, monkeypatch):
    only(monkeypatch, 1.0, 1.0, 1.0, 2 * torch.pi / 3)
    grey = torch.full((1, 4, 4, 3), 90, dtype=torch.uint8)
    red = grey.clone()
    red[..., 0] = 160
    both = crops._evaluation.normalized(torch.cat([grey, red]))
    found = 255 * pixels_of(crops, Colours(crops)(both, range(2), 0))
    assert torch.allclose(found[0], torch.tensor(90.0).expand(3, 4, 4), atol=1e-2)
    assert sorted(found[1, :, 0, 0].round().int().tolist()) == [90, 90, 160]
    assert found[1, 0, 0, 0].round() == 90
