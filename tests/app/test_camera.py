"""Frames of the camera: answered like a picture, one at a time, and nothing else is taken for one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Call, images
from PIL import Image

pytest.importorskip("gradio", reason="the extra app is not installed")

from duallora.app.camera import Camera
from duallora.app.session import Session
from duallora.app.uploads import Uploads
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest


@pytest.fixture
def session(call: Call, tmp_path: Path) -> Iterator[Session]:
    pets = images(tmp_path / "pets", ["cat", "dog"], 6)
    words = ["--epochs", 1, "--method.min_steps", 0, "--method.energy_threshold", 0.7]
    assert call("learn", tmp_path / "model", pets, *words).code == 0
    (tmp_path / "uploads").mkdir()
    request = ModelRequest(MethodChoice("duallora", {}), device="cpu")
    session = Session(tmp_path / "model", request, Uploads(tmp_path / "uploads"))
    yield session
    session.close()


def frame(image: Image.Image, **fields: Any) -> dict[str, Any]:
    pixels = np.asarray(image.convert("RGB"))
    rgb = base64.b64encode(pixels.tobytes()).decode()
    return {"width": image.width, "height": image.height, "rgb": rgb, "below": 0.0, **fields}


def test_a_frame_is_answered_like_the_same_picture(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "pets" / "cat" / "001.png"
    (answer,) = session.ask([file])
    said = Camera(session).answer(frame(Image.open(file)))
    assert said["name"] == answer.record["class"] == "cat"
    assert f"cat ({100 * answer.record['probability']:.1f} %)" in said["html"]
    assert f"Familiarity {1 - answer.record['unknown']:.2f}" in said["html"]
    assert Camera(session).answer(frame(Image.open(file), below=1.0))["name"] == "unknown"
    assert list(session.uploads.folder.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"width": 2_000},
        {"width": 7},
        {"height": "high"},
        {"rgb": "no base64"},
        {"rgb": 5},
        {"below": float("nan")},
        {"below": [1]},
    ],
)
def test_what_is_no_frame_gives_a_sentence(session: Session, wrong: Any) -> None:
    given = frame(Image.new("RGB", (8, 8))) | wrong if wrong else wrong
    said = Camera(session).answer(given)
    assert said["failed"] and "this is no frame of a camera; load the page again." in said["html"]


def test_a_frame_is_dropped_while_another_one_is_answered(session: Session) -> None:
    camera, given = Camera(session), frame(Image.new("RGB", (8, 8)))
    inner = session.model

    def model() -> Any:
        assert camera.answer(given) == {}
        return inner()

    session.model = model  # type: ignore[method-assign]
    assert "html" in camera.answer(given)
    session.model = inner  # type: ignore[method-assign]
    assert "html" in camera.answer(given)


def test_a_model_that_knows_nothing_says_so(session: Session, tmp_path: Path) -> None:
    session.folder = tmp_path / "new"
    said = Camera(session).answer(frame(Image.new("RGB", (8, 8))))
    assert said["failed"] and "learned nothing yet" in said["html"]
