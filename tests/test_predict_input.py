"""What ``predict`` takes: one image or many, held a batch at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_tasks import Patterns, small_config
from tiny import tiny_backbone

from duallora import ContinualLearner, DualLoRAError
from duallora.data.one_by_one import one_by_one
from duallora.training import EVALUATION_BATCH


@pytest.fixture(scope="module")
def learner() -> ContinualLearner:
    made = ContinualLearner(tiny_backbone(), small_config("frozen"), device="cpu")
    made.learn(Patterns(["ant", "bee"], 6))
    return made


def picture(shade: int = 90) -> Image.Image:
    return Image.new("RGB", (40, 30), (shade, 20, 200))


@pytest.mark.parametrize(
    "one",
    [
        lambda folder: picture(),
        lambda folder: picture().convert("L"),
        lambda folder: folder / "one.png",
        lambda folder: str(folder / "one.png"),
        lambda folder: torch.zeros(3, 40, 30),
        lambda folder: torch.zeros(1, 40, 30, dtype=torch.uint8),
        lambda folder: torch.zeros(40, 30),
        lambda folder: torch.zeros(1, 3, 40, 30),
        lambda folder: iter([picture()]),
        lambda folder: (picture(),),
        lambda folder: np.array([str(folder / "one.png")]),
    ],
)
def test_one_image_gets_one_answer(
    one: Callable[[Path], Any], learner: ContinualLearner, tmp_path: Path
) -> None:
    picture().save(tmp_path / "one.png")
    (answer,) = learner.predict(one(tmp_path))
    assert answer.label in ("ant", "bee")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(5, 40, 30), "not one image"),
        (torch.zeros(4, 3, 40, 30, 1), "not one image"),
        (torch.tensor(3.0), "not one image"),
        (np.zeros((40, 30, 3), np.uint8), "as ndarray: hand over one image"),
        (b"\x89PNG", "as bytes"),
        ({"a.png": 1}, "as dict"),
        (7, "no images in int"),
        (None, "no images in NoneType"),
        ([np.zeros((4, 4))], "not ndarray"),
        ("nowhere/photo.jpg", re.escape("nowhere/photo.jpg does not exist")),
    ],
)
def test_everything_else_is_one_sentence(wrong: Any, words: str, learner: ContinualLearner) -> None:
    with pytest.raises(DualLoRAError, match=words) as caught:
        learner.predict(wrong)
    assert "\n" not in str(caught.value)


class Endless:
    """A data set that answers to any index; its length says where it ends."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Image.Image:
        self.asked += 1
        return picture(index % 200)


def test_the_length_of_a_data_set_is_respected(learner: ContinualLearner) -> None:
    data = Endless(EVALUATION_BATCH + 3)
    assert len(learner.predict(data)) == EVALUATION_BATCH + 3 == data.asked


def test_images_are_taken_as_they_come_and_let_go(
    learner: ContinualLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, seen = 0, []

    def images() -> Iterator[Image.Image]:
        nonlocal given
        for i in range(3 * EVALUATION_BATCH + 1):
            given += 1
            yield picture(i % 200)

    plain = learner.outputs_of

    def noted(batches: Any, **options: Any) -> Any:
        seen.append(given)
        return plain(batches, **options)

    monkeypatch.setattr(learner, "outputs_of", noted)
    streamed = learner.predict(images())
    assert seen == [EVALUATION_BATCH, 2 * EVALUATION_BATCH, 3 * EVALUATION_BATCH, 3 * EVALUATION_BATCH + 1]
    monkeypatch.undo()
    assert streamed == learner.predict([picture(i % 200) for i in range(3 * EVALUATION_BATCH + 1)])


def test_no_image_is_taken_before_anything_was_learned() -> None:
    new, taken = ContinualLearner(tiny_backbone(), small_config("frozen"), device="cpu"), []

    def images() -> Iterator[Image.Image]:
        for i in range(1000):
            taken.append(i)
            yield picture()

    with pytest.raises(DualLoRAError, match="learned nothing yet"):
        new.predict(images())
    assert len(taken) <= 1
    assert new.predict([]) == []


def test_a_batch_of_tensors_is_as_many_images() -> None:
    assert [tuple(image.shape) for image in one_by_one(torch.zeros(2, 3, 4, 5))] == [(3, 4, 5)] * 2
