"""Exported files say what ``predict`` says, on real images, in both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, caller
from small_tasks import new_learner, small_config, three_tasks
from torch import Tensor

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError, load_backbone, streams
from duallora.bench.synthetic import simulated_learner
from duallora.export import METADATA, OUTPUTS, Format, export, metadata
from duallora.predictions import class_probabilities, task_probabilities

pytestmark = pytest.mark.slow

FORMATS: tuple[Format, ...] = ("torch-export", "onnx")
CONFIG = DualLoRAConfig(rank=4, residual="own", residual_rank=4, epochs=1, min_steps=0)
OTHER = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def digits() -> streams.Stream:
    return streams.digits(tasks=2, classes=4, train_per_class=8, holdout=4)


@pytest.fixture(scope="module", params=["embedded", OTHER])
def learner(request: pytest.FixtureRequest, digits: streams.Stream) -> ContinualLearner:
    """Two tasks of digits; a timm ViT has random weights and small images, for speed."""
    size = None if request.param == "embedded" else 32
    backbone = load_backbone(request.param, pretrained=size is None, image_size=size)
    made = ContinualLearner(backbone, CONFIG, device="cpu", augment="none")
    for task in digits.tasks:
        made.learn(task.train)
    return made


def expected(learner: ContinualLearner, images: Tensor) -> list[Tensor]:
    outputs = learner.outputs_of([images])
    probabilities = class_probabilities(outputs).float()
    return [probabilities, outputs.task_posterior.exp(), outputs.familiarity]


def run(form: str, file: Path, images: Tensor) -> list[Tensor]:
    if form == "torch-export":
        return list(torch.export.load(file).module()(images))
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(list(OUTPUTS), {"images": images.numpy()})]


def about(form: str, file: Path) -> dict[str, Any]:
    if form == "torch-export":
        extra = {METADATA: ""}
        torch.export.load(file, extra_files=extra)
        return dict(json.loads(extra[METADATA]))
    onnx = pytest.importorskip("onnx")
    return dict(json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["duallora"]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_says_what_predict_says(
    form: Format, learner: ContinualLearner, digits: streams.Stream, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    tests = [task.test for task in digits.tasks]
    images = torch.stack([learner.preprocess(test[i][0]) for test in tests for i in range(4)])
    before = expected(learner, images)
    file = tmp_path / "model"
    export(learner, form, file)
    for count in (8, 1, 3):  # any number of images
        for found, wanted in zip(run(form, file, images[:count]), before, strict=True):
            torch.testing.assert_close(found, wanted[:count], rtol=0, atol=1e-4)
    found = about(form, file)
    assert found == json.loads(json.dumps(metadata(learner)))
    assert found["classes"] == learner.classes
    assert found["preprocessing"]["mean"] == list(learner.backbone.info.mean)
    for after, wanted in zip(expected(learner, images), before, strict=True):
        assert torch.equal(after, wanted), "an export leaves the learner as it is"


@pytest.mark.parametrize(
    "name",
    [
        "duallora",
        "inflora",
        "cl-lora",
        "mos",
        "tuna",
        "ssiat",
        "lr-rgda",
        "l2p",
        "dualprompt",
        "ranpac",
        "lora",
    ],
)
def test_other_methods_can_be_exported(name: str, tmp_path: Path) -> None:
    """And the default of ``duallora``, without a residual adapter."""
    learner = new_learner(small_config(name, **({"residual": "none"} if name == "duallora" else {})))
    for task in three_tasks()[:2]:
        learner.learn(task)
    images = torch.stack([learner.preprocess(three_tasks()[0][i][0]) for i in range(3)])
    export(learner, "torch-export", tmp_path / "model.pt2")
    found = run("torch-export", tmp_path / "model.pt2", images)
    outputs = learner.outputs_of([images])
    wanted = [expected(learner, images)[0], task_probabilities(outputs, 2), outputs.familiarity]
    for part, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, value, rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="learned nothing"):
        export(new_learner(), "torch-export", tmp_path / "model.pt2")
    with pytest.raises(DualLoRAError, match="unknown format"):
        export(new_learner(), "pickle", tmp_path / "model.pt2")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = caller(capsys)
    model = tmp_path / "model"
    simulated_learner(load_backbone(), DualLoRAConfig(), 2, 3).save(model)
    called = call("export", model, "--out", tmp_path / "model.pt2")
    assert called.code == 0, called
    assert "6 classes" in called.out
    assert about("torch-export", tmp_path / "model.pt2")["tasks"] == ["synthetic 1", "synthetic 2"]
    assert_refused(call("export", model, "--out", tmp_path / "no" / "x"), "does not exist")
    assert_refused(call("export", tmp_path / "none", "--out", tmp_path / "x"), "none")
