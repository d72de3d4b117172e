"""A saved learner is the same one when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tasks import (
    Patterns,
    assert_same_outputs,
    assert_same_state,
    learned,
    new_learner,
    small_config,
    three_tasks,
    unseen,
)
from tiny import tiny_backbone

import duallora.learner
from duallora import ContinualLearner, DualLoRAError, load_backbone
from duallora.backbones.backbone import Backbone
from duallora.storage import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")


@pytest.fixture(scope="module")
def learner() -> ContinualLearner:
    """Has learned three tasks; the tests only read it."""
    return learned("duallora", epochs=4, learning_rate=2e-3)


@pytest.fixture(scope="module")
def saved(learner: ContinualLearner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    learner.save(folder)
    return folder


def test_another_backbone_is_refused_and_both_are_named(saved: Path) -> None:
    other = tiny_backbone(seed=1)
    was = tiny_backbone().info.sha256[:12]
    with pytest.raises(DualLoRAError, match=f"'tiny-vit'.*{was}.*{other.info.sha256[:12]}"):
        ContinualLearner.load(saved, backbone=other)


def test_an_unknown_method_is_refused(saved: Path, tmp_path: Path) -> None:
    manifest, tensors = checkpoint.read(saved)
    with checkpoint.exclusive(tmp_path):
        checkpoint.commit(tmp_path, manifest | {"method": "replay"}, tensors)
    with pytest.raises(DualLoRAError, match="method 'replay', unknown here; the methods are duallora, "):
        ContinualLearner.load(tmp_path, backbone=tiny_backbone())


def test_what_the_manifest_says(learner: ContinualLearner, saved: Path) -> None:
    manifest = json.loads((saved / "model.json").read_text())
    assert manifest["format_version"] == 2 and manifest["previous"] is None
    assert manifest["classes"] == learner.classes == ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
    assert [task["name"] for task in manifest["tasks"]] == ["task 1", "task 2", "task 3"]
    assert manifest["tasks"][1]["classes"] == ["cat", "dog", "elk"]
    info = learner.backbone.info
    assert manifest["backbone"]["sha256"] == info.sha256 and manifest["backbone"]["name"] == info.name
    for key in ("mean", "std", "input_size"):
        assert tuple(manifest["backbone"][key]) == getattr(info, key)
    assert manifest["backbone"]["interpolation"] == "bicubic"
    assert manifest["config"] == vars(learner.config) and manifest["method"] == "duallora"
    assert (manifest["seed"], manifest["augment"]) == (0, "crop,flip")
    assert set(manifest["files"]) == {manifest["weights"]}
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ""}


def test_saving_again_is_a_step_that_can_be_undone(tmp_path: Path) -> None:
    learner = new_learner()
    learner.learn(three_tasks()[0])
    learner.save(tmp_path)
    data = unseen(three_tasks()[:1])
    before = learner.outputs(data)
    learner.learn(three_tasks()[1])
    learner.save(tmp_path)
    checkpoint.undo(tmp_path)
    restored = ContinualLearner.load(tmp_path, device="cpu", backbone=tiny_backbone())
    assert [task.name for task in restored.tasks] == ["task 1"]
    assert_same_outputs(restored.outputs(data), before)
    restored.learn(three_tasks()[1])
    assert_same_state(restored, learner)


def test_loading_writes_nothing(saved: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    with checkpoint.exclusive(saved):  # readers never lock
        ContinualLearner.load(saved, backbone=tiny_backbone())
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == before


def test_a_second_writer_is_refused(learner: ContinualLearner, saved: Path) -> None:
    with checkpoint.exclusive(saved), pytest.raises(DualLoRAError, match="another process is writing"):
        learner.save(saved)


EMBEDDED = Path(duallora.learner.__file__).parent / "weights" / "vit-micro-conv-64.safetensors"


def test_a_local_backbone_travels_with_the_model(tmp_path: Path) -> None:
    source, folder = tmp_path / "weights.safetensors", tmp_path / "model"
    source.write_bytes(EMBEDDED.read_bytes())
    learner = ContinualLearner("embedded", small_config(), backbone_file=source, device="cpu")
    learner.learn(Patterns(["ant", "bee"], 2))
    learner.save(folder)
    copies = list(folder.glob("backbone-*.safetensors"))
    assert [path.stem for path in copies] == [f"backbone-{learner.backbone.info.sha256[:12]}"]
    source.unlink()
    folder = folder.rename(tmp_path / "moved")
    loaded = ContinualLearner.load(folder, device="cpu")
    data = Patterns(["ant", "bee"], 2, 1)
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))
    loaded.save(folder)
    loaded.save(tmp_path / "copy")
    assert_same_outputs(
        ContinualLearner.load(tmp_path / "copy", device="cpu").outputs(data), learner.outputs(data)
    )
    # The copy is the backbone that the model was learned on: a change of it is found out.
    (folder / copies[0].name).write_bytes(EMBEDDED.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DualLoRAError, match="is not the file that was saved"):
        ContinualLearner.load(folder)


def test_a_local_backbone_that_has_changed_is_not_saved(tmp_path: Path) -> None:
    """The model would name weights that it was not learned on, and could never be loaded again."""
    source, folder = tmp_path / "weights.safetensors", tmp_path / "model"
    source.write_bytes(EMBEDDED.read_bytes())
    learner = ContinualLearner("embedded", small_config("linear"), backbone_file=source, device="cpu")
    learner.learn(Patterns(["ant", "bee"], 2))
    source.write_bytes(EMBEDDED.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DualLoRAError, match=r"weights\.safetensors"):
        learner.save(folder)
    assert not (folder / "model.json").exists()


def test_a_backbone_object_is_taken_as_it_is() -> None:
    backbone: Backbone = load_backbone()
    learner = ContinualLearner(backbone, small_config("linear"), device="cpu")
    assert learner.backbone is backbone
