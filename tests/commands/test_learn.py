"""``duallora learn`` and what can be asked of the model then, from a first task to undo."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, caller, images, on_disk
from tiny import tiny_backbone

from duallora import METHODS, CheckFailed, ContinualLearner


def test_a_model_is_taught_asked_measured_and_taken_back(
    call: Call, model: Path, pets: Path, tmp_path: Path
) -> None:
    cars = images(tmp_path / "cars", ["bus", "van"], 10)
    first = call("inspect", model, "--json").out
    learned = call("learn", model, cars, "--check", pets, "--max-drop", 1, "--epochs", 2, "--seed", 3)
    assert learned.code == 0
    for part in ("2 classes, 18 images", "% before, ", "held-back accuracy", "calibration error"):
        assert part in learned.out
    assert "old classes most often confused with the new ones:" in learned.out

    predicted = call("predict", model, pets, cars / "bus" / "000.png", "--json", "--top", 2)
    predictions = json.loads(predicted.out)["predictions"]
    assert len(predictions) == 25
    assert list(predictions[0]) == [
        "path",
        "class",
        "probability",
        "task",
        "task_confidence",
        "unknown",
        "called_unknown",
        "top",
    ]
    assert predictions[-1]["path"] == str(cars / "bus" / "000.png")
    assert predictions[-1]["top"][0] == {
        "class": predictions[-1]["class"],
        "probability": predictions[-1]["probability"],
    }

    found = json.loads(call("evaluate", model, pets, "--json").out)
    assert list(found) == ["accuracy", "tasks", "task_confusion", "calibration_error"]
    assert [(task["name"], task["images"]) for task in found["tasks"]] == [("pets", 24), ("cars", 0)]
    assert found["tasks"][1]["accuracy"] is None
    assert sum(map(sum, found["task_confusion"])) == 24
    assert "pets" in call("evaluate", model, pets).out

    about = json.loads(call("inspect", model, "--json").out)
    assert [task["classes"] for task in about["tasks"]] == [["cat", "dog"], ["bus", "van"]]
    assert about["config"]["epochs"] == 1  # --epochs 2 was for one task
    assert about["seed"] == 0
    (layer,) = about["layers"]
    assert layer["free"] == 32 - sum(layer["bases"])
    assert len(layer["residual_ranks"]) <= 2
    assert about["bytes"]["total"] == sum(size for part, size in about["bytes"].items() if part != "total")
    assert "free directions" in call("inspect", model).out

    assert "pets" in call("undo", model).out
    assert call("inspect", model, "--json").out == first
    assert_refused(call("undo", model), "othing to undo")


@pytest.mark.slow
def test_every_method_can_be_taught_and_inspected(call: Call, pets: Path, tmp_path: Path) -> None:
    for name in METHODS:
        assert call("learn", tmp_path / name, pets, "--method", name, "--epochs", 1).code == 0
        about = json.loads(call("inspect", tmp_path / name, "--json").out)
        assert about["method"] == name
        assert bool(about["layers"]) == (name in ("duallora", "inflora"))
        for layer in about["layers"]:
            assert set(layer["projections"]) <= set("qkv") and 0 <= layer["free"] <= 64
        assert about["bytes"]["total"] > about["bytes"]["heads"] > 0
        assert call("inspect", tmp_path / name).code == 0


def test_predictions_as_a_table_and_as_csv(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    called = call("predict", model, pets / "cat", "--out", tmp_path / "p.csv", "--unknown-below", 1)
    assert called.code == 0
    assert str(pets / "cat" / "000.png") in called.out
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["class"] for row in rows} == {"unknown"}  # no familiarity reaches 1
    assert {row["class_1"] for row in rows} <= {"cat", "dog"}
    assert float(rows[0]["probability_1"]) + float(rows[0]["probability_2"]) == pytest.approx(1)


def test_a_folder_with_val_is_measured_there(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "cars" / "train", ["bus", "van"], 3)
    images(tmp_path / "cars" / "val", ["bus", "van"], 2, seed=1)
    learned = call("learn", tmp_path / "model", tmp_path / "cars", "--name", "vehicles", "--epochs", 1)
    assert "vehicles: 2 classes, 6 images" in learned.out
    assert "on 4 images" in learned.out
    assert json.loads(call("evaluate", tmp_path / "model", tmp_path / "cars", "--json").out)["tasks"] == [
        {"name": "vehicles", "accuracy": pytest.approx(1, abs=1), "images": 4}
    ]


def test_few_images_are_not_held_back(call: Call, tmp_path: Path) -> None:
    learned = call("learn", tmp_path / "model", images(tmp_path / "few", ["a", "b"], 3), "--epochs", 1)
    assert learned.code == 0
    assert "not measured" in learned.out


def test_only_classes_of_ten_images_are_held_back(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "mixed", ["many"], 10)
    images(tmp_path / "mixed", ["few"], 3)
    learned = call("learn", tmp_path / "model", tmp_path / "mixed", "--epochs", 1)
    assert "2 classes, 12 images" in learned.out
    assert "on 1 images" in learned.out


def test_the_same_folder_again_is_another_task(call: Call, model: Path, pets: Path) -> None:
    assert "learned pets 2: 2 classes" in call("learn", model, pets).out
    assert_refused(call("learn", model, pets, "--name", "pets"), "a task named pets already", "--name")


def test_a_dry_run_writes_nothing(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    (pets / "cat" / "broken.png").write_bytes(b"no image")
    before = on_disk(tmp_path)
    for place in (model, tmp_path / "new"):
        planned = call("learn", place, pets, "--dry-run")
        assert planned.code == 0
        for part in ("2 classes", "22 images to learn from, 2 held back", "bad images: 1", "minutes on cpu"):
            assert part in planned.out
        assert str(pets / "cat" / "broken.png") in planned.out
    assert on_disk(tmp_path) == before


def test_bad_images_are_skipped_and_counted(call: Call, pets: Path, tmp_path: Path) -> None:
    (pets / "cat" / "broken.png").write_bytes(b"no image")
    (pets / "dog" / "notes.txt").write_text("no image")
    learned = call("learn", tmp_path / "model", pets, "--skip-bad-images", "--epochs", 1)
    assert learned.code == 0
    assert "bad images left out: 2" in learned.out


def test_a_drop_of_the_check_leaves_the_model(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    """Names swapped: what was a cat is taught as a dog."""
    (images(tmp_path / "raw", ["cat", "dog"], 12, seed=1) / "cat").rename(tmp_path / "raw" / "was_cat")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (tmp_path / "raw" / "dog").rename(swapped / "cat")
    (tmp_path / "raw" / "was_cat").rename(swapped / "dog")
    before = on_disk(model)
    refused = call("learn", model, swapped, "--check", pets, "--epochs", 1)
    assert_refused(refused, "100.0 % before", "% after", "0.02", code=CheckFailed.exit_code)
    assert on_disk(model) == before
    assert call("learn", model, swapped, "--check", pets, "--max-drop", 1, "--epochs", 1).code == 0


def test_the_task_alone_is_trained_as_asked(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = ContinualLearner.learn

    def spy(self: ContinualLearner, *args: Any, **named: Any) -> Any:
        seen.update(epochs=self.method.config.epochs, seed=self.method.seed, augment=self.augment)
        return real(self, *args, **named)

    monkeypatch.setattr(ContinualLearner, "learn", spy)
    stored = json.loads(call("inspect", model, "--json").out)
    words = ["--epochs", 2, "--seed", 5, "--augment", "none"]
    assert call("learn", model, images(tmp_path / "cars", ["bus", "van"]), *words).code == 0
    assert seen == {"epochs": 2, "seed": 5, "augment": "none"}
    after = json.loads(call("inspect", model, "--json").out)
    assert [after[key] for key in ("config", "seed", "augment")] == [
        stored[key] for key in ("config", "seed", "augment")
    ]


def test_the_embedded_backbone_is_named_as_small(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = caller(capsys)
    folder = images(tmp_path / "pets", ["cat", "dog"], 2)
    learned = call("learn", tmp_path / "model", folder, "--epochs", 1)
    assert learned.code == 0
    assert sum("--backbone vit_base_patch16_224" in line for line in learned.out.splitlines()) == 1
    assert json.loads(call("inspect", tmp_path / "model", "--json").out)["backbone"]["name"] == "embedded"


def test_a_model_keeps_the_size_of_its_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = caller(capsys)
    model, folder = tmp_path / "model", images(tmp_path / "pets", ["cat", "dog"], 2)
    assert_refused(call("learn", model, folder, "--image-size", 36), "36 x 36 do not fit", "image size is 32")
    assert not model.exists()
    assert call("learn", model, folder, "--image-size", 32, "--epochs", 1).code == 0
    backbone = json.loads(call("inspect", model, "--json").out)["backbone"]
    assert backbone["name"] == "embedded" and backbone["input_size"] == [3, 32, 32]
    assert ContinualLearner.load(model, device="cpu").backbone.grid == (4, 4)
    refused = call("learn", model, folder, "--name", "more", "--image-size", 64)
    assert_refused(refused, "takes images of 32 x 32 pixels, not of --image-size 64", "a new model")
    assert call("learn", model, folder, "--name", "more", "--image-size", 32, "--epochs", 1).code == 0


@pytest.mark.parametrize(("family", "said"), [("siglip", True), ("vit", False)])
def test_a_final_feature_other_than_the_class_token_is_said(
    call: Call, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, said: bool
) -> None:
    for module in ("learner", "backbones.backbone"):
        monkeypatch.setattr(f"duallora.{module}.load_backbone", lambda *_: tiny_backbone(family))
    learned = call("learn", tmp_path / "model", pets, "--epochs", 1)
    small = ["--classes", 2, "--tasks", 1, "--train-per-class", 4, "--holdout", 2, "--epochs", 1]
    ran = call("run", "--out", tmp_path / "run", *small)
    for called in (learned, ran):
        assert called.code == 0
        lines = [line for line in called.out.splitlines() if line.startswith("final feature: ")]
        assert len(lines) == said
        assert not said or "attention pooling over the tokens" in lines[0]


def test_the_images_to_check_are_looked_at_twice_and_the_held_back_ones_once(
    call: Call, model: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = ContinualLearner.outputs

    def spy(self: ContinualLearner, data: Any) -> Any:
        seen.append(len(data))
        return real(self, data)

    monkeypatch.setattr(ContinualLearner, "outputs", spy)
    cars = images(tmp_path / "cars", ["bus", "van"], 10)
    assert call("learn", model, cars, "--check", pets, "--max-drop", 1, "--epochs", 1).code == 0
    assert sorted(seen) == [2, 24, 24]
