"""The example of the page: drawings that a new model can be taught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duallora.app import example
from duallora.app.intake import Draft
from duallora.app.session import Session
from duallora.app.uploads import Uploads, files_of
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest


def test_a_seed_draws_the_same_picture_and_another_one_does_not() -> None:
    first, again, other = (np.asarray(example.drawn("star", seed)) for seed in (1, 1, 2))
    assert first.shape == (128, 128, 3) and (first == again).all() and (first != other).any()


def test_its_images_pass_the_check_of_every_lesson(tmp_path: Path) -> None:
    draft = Draft()
    assert draft.add([files_of(example.write(tmp_path / "shapes"))], "") == []
    check = draft.check()
    assert [each.name for each in check.classes] == list(example.CLASSES)
    assert check.refusal() is None and check.twins == () and check.images == 3 * example.EACH
    assert all(each.held_back for each in check.classes)


@pytest.mark.slow
def test_a_model_that_learned_it_names_new_drawings(tmp_path: Path) -> None:
    request = ModelRequest(MethodChoice("duallora", {"epochs": 1, "min_steps": 0}), device="cpu")
    (tmp_path / "uploads").mkdir()
    session = Session(tmp_path / "model", request, Uploads(tmp_path / "uploads"))
    draft = Draft()
    draft.add([files_of(example.write(tmp_path / "shapes"))], "")
    teaching = session.teach(draft.check(), example.LESSON)
    teaching.join()
    assert teaching.error is None
    new = [
        (name, tmp_path / f"{name}-{seed}.png") for name in example.CLASSES for seed in range(1_000, 1_010)
    ]
    for name, file in new:
        example.drawn(name, int(file.stem.rpartition("-")[2])).save(file)
    answers = session.ask([file for _, file in new])
    session.close()
    right = sum(answer.record["class"] == name for answer, (name, _) in zip(answers, new, strict=True))
    assert right >= 27  # of 30
