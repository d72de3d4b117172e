"""A model saved in the past is read as it was meant; ``golden/make.py`` made it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import make

from duallora import ContinualLearner, DualLoRAError, streams
from duallora.storage import checkpoint

GOLDEN = make.HERE / "format-2"


def load(folder: Path) -> ContinualLearner:
    return ContinualLearner.load(folder, device="cpu", backbone=make.backbone(GOLDEN))


def expected() -> dict[str, torch.Tensor]:
    stored = json.loads((GOLDEN / "expected.json").read_text())
    return {name: torch.tensor(values) for name, values in stored.items()}


def test_the_golden_model_predicts_what_it_did() -> None:
    learner = load(GOLDEN / "model")
    assert [task.name for task in learner.tasks] == ["task 1", "task 2"]
    assert learner.classes == list(make.stream().class_order) == ["0", "2", "3", "1"]
    found = make.figures(learner.outputs_of([make.batch(learner)]))
    assert found.keys() == expected().keys()
    for name, values in expected().items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-4, msg=name)


def test_the_expected_values_say_something() -> None:
    """Probabilities of 0 and 1 would be met by nearly any model."""
    for name, values in expected().items():
        assert len(values) == 26
        telling = (values > 0.01) & (values < 0.99)
        assert telling.sum() >= 6, (name, int(telling.sum()))


def test_the_golden_model_goes_on_learning(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    learner = load(tmp_path / "model")
    images = make.batch(learner)
    before = learner.outputs_of([images])
    more = streams.digits(tasks=1, classes=10, train_per_class=6, order_seed="alphabetical").tasks[0].train
    learner.learn(more, name="task 3")
    learner.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert [task.name for task in loaded.tasks] == ["task 1", "task 2", "task 3"]
    assert len(loaded.classes) == 10
    checkpoint.undo(tmp_path / "model")
    restored = load(tmp_path / "model")
    assert torch.equal(restored.outputs_of([images]).heads, before.heads)


def test_the_golden_files_are_what_they_were() -> None:
    manifest = json.loads((GOLDEN / "model" / "model.json").read_text())
    assert manifest["format_version"] == checkpoint.FORMAT_VERSION == 2
    data = (GOLDEN / "model" / manifest["weights"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["files"][manifest["weights"]]
    assert len(data) < 1_500_000


def test_a_model_of_the_first_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Its class rows are of the final feature alone: there is nothing to go on from."""
    shutil.copytree(make.HERE / "format-1" / "model", tmp_path / "model")
    before = (tmp_path / "model" / "model.json").read_bytes()
    for act in (
        lambda: ContinualLearner.load(tmp_path / "model", device="cpu"),
        lambda: checkpoint.undo(tmp_path / "model"),
        lambda: ContinualLearner("embedded", device="cpu").save(tmp_path / "model"),
    ):
        with pytest.raises(
            DualLoRAError, match=r"earlier duallora \(format 1, .*teach the model again"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "model" / "model.json").read_bytes() == before
