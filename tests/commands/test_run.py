"""``duallora run`` writes a folder, resumes it, and refuses another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, images, on_disk
from tiny import tiny_backbone

from duallora import ContinualLearner


def test_run_writes_a_folder_and_refuses_to_write_it_again(call: Call, tmp_path: Path) -> None:
    small = ["--classes", 4, "--tasks", 2, "--train-per-class", 6, "--holdout", 3, "--epochs", 1]
    finished = call("run", "--out", tmp_path / "run", *small)
    assert finished.code == 0
    assert "Accuracy in percent" in finished.out
    assert str(tmp_path / "run" / "report.md") in finished.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["method"]["name"] == "duallora"
    assert results["config"]["method"]["epochs"] == 1
    assert results["config"]["augment"] == "crop"
    assert len(results["tasks"]) == 2
    before = on_disk(tmp_path)
    assert_refused(call("run", "--out", tmp_path / "run", *small), "finished run")
    assert_refused(call("run", "--out", tmp_path / "run", *small, "--seed", 1), "finished run")
    assert on_disk(tmp_path) == before


def _nothing(*_: object, **__: object) -> None:
    raise AssertionError("called too early, or for nothing")


def test_run_refuses_a_folder_before_it_loads_or_decodes_anything(
    call: Call, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--stream", pets, "--tasks", 1, "--holdout", 2, "--epochs", 1]
    assert call("run", "--out", tmp_path / "run", *words).code == 0
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", _nothing)
    monkeypatch.setattr("duallora.streams.folder.read_image", _nothing)
    assert_refused(call("run", "--out", tmp_path / "run", *words), "finished run")
    assert_refused(call("run", "--out", pets, *words), "not from a run")


def _interrupted_run(call: Call, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """A run that ends after its first task."""
    real = ContinualLearner.learn

    def first(self: ContinualLearner, *args: Any, **kwargs: Any) -> Any:
        if self.tasks:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualLearner, "learn", first)
        assert call("run", *words).code == 130


def test_a_resumed_run_loads_its_backbone_once(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", tmp_path / "run", "--stream", images(tmp_path / "pets", ["a", "b", "c", "d"], 4)]
    words += ["--tasks", 2, "--holdout", 1, "--epochs", 1]
    _interrupted_run(call, monkeypatch, *words)
    loaded = []
    monkeypatch.setattr(
        "duallora.backbones.backbone.load_backbone", lambda *_: loaded.append(1) or tiny_backbone()
    )
    monkeypatch.setattr("duallora.learner.load_backbone", _nothing)
    monkeypatch.setattr("duallora.commands.run._check_images", _nothing)
    assert call("run", *words).code == 0
    assert loaded == [1]
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]) == 2


def test_a_run_is_not_resumed_with_other_weights(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", tmp_path / "run", "--classes", 4, "--tasks", 2, "--train-per-class", 4, "--holdout", 2]
    words += ["--epochs", 1, "--backbone-file", tmp_path / "weights.safetensors"]
    _interrupted_run(call, monkeypatch, *words)
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["backbone_file"] == "weights.safetensors"
    assert config["backbone_sha256"] == tiny_backbone().info.sha256
    before = on_disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("duallora.backbones.backbone.load_backbone", lambda *_: tiny_backbone(seed=1))
        assert_refused(call("run", *words), "another run", "backbone_sha256")
    assert_refused(call("run", *words[:-1], tmp_path / "other.safetensors"), "another run", "backbone_file")
    assert on_disk(tmp_path) == before
    assert call("run", *words).code == 0


@pytest.mark.parametrize("words", [["--device", "mps"], ["--method.first_adapted_layer", 7]])
def test_a_run_that_cannot_begin_leaves_no_folder(call: Call, tmp_path: Path, words: list[object]) -> None:
    assert call("run", "--out", tmp_path / "run", *words).code == 2
    assert not (tmp_path / "run").exists()


def test_run_on_a_folder_in_several_domains(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "data" / "train", ["bus", "van"], 3)
    images(tmp_path / "data" / "val", ["bus", "van"], 2, seed=1)
    words = [
        "--stream",
        tmp_path / "data",
        "--domains",
        "photo, negative",
        "--method",
        "linear",
        "--epochs",
        1,
    ]
    assert call("run", "--out", tmp_path / "run", *words).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [task["name"] for task in results["tasks"]] == ["photo", "negative"]
    assert results["readout"] == "heads"
    assert str(tmp_path) not in json.dumps(results["config"])
