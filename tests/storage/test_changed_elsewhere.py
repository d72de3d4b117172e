"""What must not be lost or mistaken: other writers, other learners on a backbone, a diverged training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_tasks import Patterns, new_learner, reloaded, small_config, three_tasks
from tiny import tiny_backbone

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError
from duallora.storage import checkpoint


def test_a_save_does_not_lose_what_another_learner_saved_meanwhile(tmp_path: Path) -> None:
    first = new_learner(small_config())
    first.learn(three_tasks()[0])
    first.save(tmp_path / "model")
    one, two = reloaded(first, tmp_path / "model"), reloaded(first, tmp_path / "model")
    one.learn(three_tasks()[1], name="one")
    two.learn(three_tasks()[2], name="two")
    one.save(tmp_path / "model")
    with pytest.raises(DualLoRAError, match="changed since it was loaded"):
        two.save(tmp_path / "model")
    assert [task["name"] for task in checkpoint.read_manifest(tmp_path / "model")["tasks"]] == [
        "task 1",
        "one",
    ]
    two.save(tmp_path / "copy")  # elsewhere it may go
    one.learn(three_tasks()[2])
    one.save(tmp_path / "model")


def test_saving_what_was_loaded_is_no_step(tmp_path: Path) -> None:
    learner = new_learner(small_config())
    for number in (0, 1):
        learner.learn(three_tasks()[number])
        learner.save(tmp_path / "model")
    before = checkpoint.read_manifest(tmp_path / "model")
    reloaded(learner, tmp_path / "again").save(tmp_path / "again")
    ContinualLearner.load(tmp_path / "model", backbone=tiny_backbone()).save(tmp_path / "model")
    assert checkpoint.read_manifest(tmp_path / "model") == before
    assert len(checkpoint.undo(tmp_path / "model")["tasks"]) == 1


@pytest.mark.parametrize("first", ["duallora", "frozen"])
@pytest.mark.parametrize("second", ["duallora", "lora", "frozen"])
def test_a_backbone_belongs_to_one_learner(first: str, second: str) -> None:
    backbone = tiny_backbone()
    ContinualLearner(backbone, small_config(first), device="cpu")
    with pytest.raises(DualLoRAError, match="load it again with load_backbone"):
        ContinualLearner(backbone, small_config(second), device="cpu")


@pytest.mark.parametrize("method", ["duallora", "lora"])
def test_a_training_that_diverges_is_an_error_that_names_the_remedy(method: str, tmp_path: Path) -> None:
    learner = new_learner(small_config(method, learning_rate=1e30))
    with pytest.raises(DualLoRAError, match="lower the learning rates"):
        learner.learn(three_tasks()[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, "fast", True])
def test_a_learning_rate_is_a_positive_number(value: float) -> None:
    with pytest.raises(DualLoRAError, match="learning_rate"):
        DualLoRAConfig(learning_rate=value)


def test_tasks_of_a_single_class_leave_no_adapters(tmp_path: Path) -> None:
    learner = new_learner(small_config())
    for number, name in enumerate(["ant", "bee", "cat"]):
        learner.learn(Patterns([name], 6, number))
    names = learner.method.state()
    assert not [name for name in names if ".psi" in name or ".dense" in name or ".orthogonal." in name]
    learner.learn(Patterns(["dog", "elk"], 6, 3))
    assert [name for name in learner.method.state() if name.endswith("residual.3.psi")]
    assert torch.isfinite(learner.outputs(three_tasks()[0]).heads).all()


@pytest.mark.parametrize("key", ["backbone", "config", "tasks", "method", "seed", "classes"])
def test_a_manifest_that_lost_a_part_is_one_sentence(key: str, tmp_path: Path) -> None:
    learner = new_learner(small_config())
    learner.learn(three_tasks()[0])
    learner.save(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    if key == "classes":  # told from the tasks
        assert ContinualLearner.load(tmp_path / "model", backbone=tiny_backbone()).classes == learner.classes
        return
    with pytest.raises(DualLoRAError, match="damaged"):
        ContinualLearner.load(tmp_path / "model", backbone=tiny_backbone())
