"""ONNX files in int8 and with the preparation in the graph: what they answer, and what is measured of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import assert_refused, caller
from PIL import Image

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError, streams
from duallora.backbones.info import BackboneInfo
from duallora.data.transforms import EvaluationTransform
from duallora.export import metadata, to_onnx
from duallora.export.int8 import linear_layers, quantised
from duallora.export.parity import Parity, answers
from duallora.export.preprocessing import with_preprocessing
from duallora.export.small import small_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HALF = (0.5, 0.5, 0.5)
INFO = BackboneInfo("none", "", (0.0, 0.5, 0.5), HALF, (3, 32, 48), "bicubic", 0.875)


@pytest.fixture(scope="module")
def digits() -> streams.Stream:
    return streams.digits(tasks=2, classes=4, train_per_class=8, holdout=8)


@pytest.fixture(scope="module")
def saved(digits: streams.Stream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned two tasks of digits on the embedded backbone."""
    config = DualLoRAConfig(rank=4, residual="none", epochs=1, min_steps=0)
    learner = ContinualLearner("embedded", config, device="cpu", augment="none")
    for task in digits.tasks:
        learner.learn(task.train)
    folder = tmp_path_factory.mktemp("saved") / "model"
    learner.save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(saved: Path) -> bytes:
    """The same model as a file of fp32: tracing it takes seconds."""
    learner = ContinualLearner.load(saved, device="cpu")
    return to_onnx(learner, metadata(learner))


@pytest.fixture(scope="module")
def pictures(digits: streams.Stream) -> list[Image.Image]:
    return [task.test[i][0].convert("RGB") for task in digits.tasks for i in range(len(task.test))]


def identity(info: BackboneInfo) -> bytes:
    """A graph that gives back the prepared image."""
    shape = ["b", *info.input_size]
    ends = [onnx.helper.make_tensor_value_info(name, 1, shape) for name in ("images", "out")]
    node = onnx.helper.make_node("Identity", ["images"], ["out"])
    graph = onnx.helper.make_graph([node], "whole", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "share"), [("center", 0.875), ("center", 1.0), ("squash", 0.9)])
def test_the_graph_prepares_an_image_as_the_recipe_does(interpolation: str, mode: str, share: float) -> None:
    import onnxruntime

    info = replace(INFO, interpolation=interpolation, crop_mode=mode, crop_pct=share)
    session = onnxruntime.InferenceSession(with_preprocessing(identity(info), info))
    view = EvaluationTransform(info)
    for height, width in ((8, 8), (32, 48), (150, 90), (61, 200)):
        rng = np.random.default_rng([height, width])
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (found,) = session.run(None, {"image": image})
        levels = np.abs(found[0] - view(Image.fromarray(image)).numpy()) * 255 * 0.5
        assert levels.max() < 1.01, "a rounding may fall to the other side, and no more"
        assert levels.mean() < 0.2  # of 255; bilinear on a whole ratio has ties everywhere


def test_an_interpolation_that_onnx_has_not_is_refused() -> None:
    info = replace(INFO, interpolation="lanczos")
    with pytest.raises(DualLoRAError, match="no interpolation lanczos"):
        with_preprocessing(identity(info), info)


@pytest.mark.slow
def test_int8_keeps_the_answers_and_halves_the_weights(
    saved: Path, plain: bytes, pictures: list[Image.Image]
) -> None:
    learner = ContinualLearner.load(saved, device="cpu")
    views = [learner.preprocess(picture).numpy() for picture in pictures]
    layers = linear_layers(onnx.load_model_from_string(plain))
    assert len(layers) == 4 * learner.backbone.depth, "qkv, its output and two of the MLP in every block"
    small = quantised(plain, views[::2])
    wanted, _ = answers(plain, views[1::2])
    found, _ = answers(small, views[1::2])
    parity = Parity.of(found, wanted)
    assert parity.same_label >= 0.8 and 0 < parity.largest < 0.6
    model = onnx.load_model_from_string(small)
    kinds = {each.data_type for each in model.graph.initializer if len(each.dims) == 2}
    assert onnx.TensorProto.INT8 in kinds
    assert len(plain) - len(small) > 0.6 * 4 * learner.backbone.dim**2 * 12 * learner.backbone.depth


@pytest.mark.slow
def test_a_file_takes_images_as_decoded(
    saved: Path, plain: bytes, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = ContinualLearner.load(saved, device="cpu")
    data, (told,) = small_onnx(learner, pictures, int8=False, preprocessing=True)
    found, _ = answers(data, [np.asarray(picture) for picture in pictures])
    wanted = [dict(each.top) for each in learner.predict(pictures, top=len(learner.classes))]
    table = np.array([[row[name] for name in learner.classes] for row in wanted])
    assert np.abs(found - table).max() < 0.05 and (found.argmax(1) == table.argmax(1)).mean() > 0.95
    assert told.name == "preprocessing" and told.parity.images == len(pictures)
    props: Any = {p.key: p.value for p in onnx.load(io.BytesIO(data)).metadata_props}
    assert "uint8" in json.loads(props["duallora"])["input"]
    monkeypatch.setattr("duallora.export.small.to_onnx", lambda *_: plain)
    _, (made_up,) = small_onnx(learner, [], int8=False, preprocessing=True)
    assert made_up.parity.images == 8


@pytest.mark.slow
def test_the_command_tells_what_was_measured(
    saved: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call, folder = caller(capsys), tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures[:12]):
        picture.save(folder / f"{number:02d}.png")
    words = ("export", saved, "--format", "onnx", "--out", tmp_path / "small.onnx", "--calibrate", folder)
    called = call(*words, "--precision", "int8", "--preprocessing")
    assert called.code == 0, called
    for part in ("int8: the same class on", "preprocessing: the same class on", "of 6 images", "ms an image"):
        assert part in called.out
    assert "uint8" in called.out and called.err == ""
    props = {p.key: p.value for p in onnx.load(tmp_path / "small.onnx").metadata_props}
    about = json.loads(props["duallora"])
    assert about["precision"].startswith("int8") and "uint8" in about["input"]
    assert json.loads(props["classes"]) == about["classes"] == ContinualLearner.load(saved).classes
    assert_refused(call(*words), "--calibrate goes with")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--format", "onnx", "--precision", "int8"), "--calibrate"),
        (("--precision", "int8"), "go with --format onnx"),
        (("--format", "peft", "--preprocessing"), "go with --format onnx"),
        (("--format", "onnx", "--precision", "int8", "--calibrate", "nowhere"), "is no folder"),
        (("--format", "onnx", "--precision", "int8", "--calibrate", "."), "holds 0 images"),
    ],
)
def test_wrong_use_is_one_sentence(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(caller(capsys)("export", saved, "--out", "x", *words), part)
    assert not Path("x").exists()
