"""Features of the bare backbone, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tasks import new_learner, small_config, three_tasks, unseen
from tiny import IMAGE, WIDTH, tiny_backbone

from duallora import streams
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.errors import DualLoRAError
from duallora.methods import Method
from duallora.runs.results import images_per_second


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def test_kept_features_are_those_of_the_evaluation_bit_for_bit(tmp_path: Path) -> None:
    images, backbone = pictures(100), tiny_backbone()
    kept = FrozenFeatures.compute(backbone, images.split(64))
    assert len(kept) == 100
    kept.save(tmp_path / "features.safetensors")
    loaded = FrozenFeatures.load(tmp_path / "features.safetensors", backbone)
    assert len(loaded) == 100
    with torch.no_grad():
        plain_features = torch.cat([backbone(batch) for batch in images.split(64)])
    for each in (kept, loaded):
        for batch, expected in zip(images.split(64), plain_features.split(64), strict=True):
            found = each.lookup(batch)
            assert found is not None and torch.equal(found, expected)
        # By what an image is, whatever its place.
        found = each.lookup(images[[70, 3, 3]])
        assert found is not None and torch.equal(found, plain_features[[70, 3, 3]])


def test_one_unknown_image_is_a_miss(tmp_path: Path) -> None:
    images = pictures(6)
    kept = FrozenFeatures.compute(tiny_backbone(), [images])
    other = images.clone()
    other[4, 0, 0, 0] += 1e-6
    assert kept.lookup(images) is not None
    assert kept.lookup(other) is None
    assert kept.lookup(other[:4]) is not None
    assert kept.lookup(pictures(2, seed=1)) is None


def test_equal_images_are_kept_once() -> None:
    images = pictures(4)
    assert len(FrozenFeatures.compute(tiny_backbone(), [images, images[:2]])) == 4


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _text(path: Path) -> None:
    path.write_text("no features")


def _other(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"features": torch.zeros(2, 2)}, path)


@pytest.mark.parametrize("damage", [_truncated, _text, _other, Path.unlink])
def test_features_that_cannot_be_read_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "features.safetensors"
    FrozenFeatures.compute(tiny_backbone(), [pictures(3)]).save(path)
    damage(path)
    with pytest.raises(DualLoRAError, match=r"features\.safetensors holds no features .* delete it"):
        FrozenFeatures.load(path, tiny_backbone())


@pytest.mark.parametrize("width", [WIDTH, 5 * WIDTH, 0])
def test_features_of_another_width_are_refused(tmp_path: Path, width: int) -> None:
    """A file of an earlier version holds the final features alone."""
    path, backbone = tmp_path / "features.safetensors", tiny_backbone()
    keys = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    FrozenFeatures(keys, torch.zeros(3, width)).save(path)
    expected = f"holds features of width {width}, but those of tiny-vit have width {backbone.row_dim}"
    with pytest.raises(DualLoRAError, match=rf"features\.safetensors {expected}.*; delete it") as caught:
        FrozenFeatures.load(path, backbone)
    assert "\n" not in str(caught.value)
    FrozenFeatures(keys, torch.zeros(3, backbone.row_dim)).save(path)
    assert len(FrozenFeatures.load(path, backbone)) == 3


def test_features_without_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    FrozenFeatures(torch.arange(48, dtype=torch.uint8).reshape(3, 16), torch.zeros(128)).save(path)
    with pytest.raises(DualLoRAError, match="holds features of width 128"):
        FrozenFeatures.load(path, tiny_backbone())


class Lying(FrozenFeatures):
    """Says of every image that its features are zero, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0, 4 * WIDTH))
        self.asked = 0

    def lookup(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.zeros(len(images), 4 * WIDTH)


def test_a_method_takes_its_frozen_features_from_the_cache_where_it_has_them() -> None:
    learner = new_learner(small_config("ncm"))
    images = pictures(3)
    method: Method = learner.method
    plain_features = method.frozen_features(images)
    assert torch.equal(plain_features, learner.backbone(images))
    method.context = replace(method.context, cache=FrozenFeatures.compute(tiny_backbone(), [images[:2]]))
    assert torch.equal(method.frozen_features(images), plain_features)  # one is missing: all are computed
    method.context = replace(method.context, cache=Lying())
    assert not method.frozen_features(images).any()


def test_the_speed_is_measured_without_the_cache() -> None:
    learner = new_learner(small_config("ncm"))
    task = three_tasks()[0]
    learner.learn(task)
    lying = Lying()
    learner.method.context = replace(learner.method.context, cache=lying)
    test = streams.task.as_task_dataset(unseen([task]))
    learner.outputs(test)
    asked = lying.asked
    assert asked > 0
    assert images_per_second(learner, [test]) > 0
    assert lying.asked == asked
    assert learner.method.context.cache is lying
