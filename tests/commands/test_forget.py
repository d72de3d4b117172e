"""``duallora forget``: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Call, assert_refused, images, on_disk, taught_once


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two classes."""
    folder = tmp_path_factory.mktemp("template")
    lessons = {"pets": ["cat", "dog"], "cars": ["bus", "van"]}
    taught_once(folder / "model", *(images(folder / name, classes, 6) for name, classes in lessons.items()))
    return folder


@pytest.fixture
def model(call: Call, template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


def classes(call: Call, model: Path) -> list[list[str]]:
    return [task["classes"] for task in json.loads(call("inspect", model, "--json").out)["tasks"]]


def test_a_task_is_forgotten_undone_and_purged(call: Call, model: Path, tmp_path: Path) -> None:
    called = call("forget", model, "--task", "pets")
    assert called.code == 0 and called.err == ""
    assert "has forgotten cat, dog, with the task pets as a whole; it knows 2 classes" in called.out
    assert "other classes and relearning: not measured; give labelled images in --check" in called.out
    assert "what stays of it: its share of the pooled covariances" in called.out
    assert classes(call, model) == [[], ["bus", "van"]]
    assert "(forgotten 1)" in call("inspect", model).out
    answers = json.loads(call("predict", model, tmp_path / "pets", "--json").out)["predictions"]
    assert {answer["class"] for answer in answers} <= {"bus", "van"}
    assert_refused(call("evaluate", model, tmp_path / "pets"), "has not learned", "'cat'")
    assert call("undo", model).code == 0
    assert classes(call, model) == [["cat", "dog"], ["bus", "van"]]
    called = call("forget", model, "--task", "pets", "--purge")
    assert "the previous state is deleted" in called.out
    assert_refused(call("undo", model), "nothing to undo")
    assert "pets" not in (model / "model.json").read_text()
    assert len([path for path in model.iterdir() if path.suffix == ".safetensors"]) == 1
    assert call("learn", model, tmp_path / "pets", "--epochs", 1).code == 0
    assert classes(call, model) == [[], ["bus", "van"], ["cat", "dog"]]


def test_a_name_that_speaks_of_a_forgotten_class_is_told(call: Call, model: Path, tmp_path: Path) -> None:
    words = (model, images(tmp_path / "birds", ["owl", "jay"], 6), "--epochs", 1, "--name", "my owl")
    assert call("learn", *words).code == 0
    said = call("forget", model, "--class", "owl").out
    assert "the name of the task 'my owl' names what is forgotten; it goes with the task alone" in said
    assert "the name of" not in call("forget", model, "--class", "cat").out


def test_purging_alone_forgets_nothing(call: Call, model: Path) -> None:
    before = classes(call, model)
    assert "the previous state is deleted" in call("forget", model, "--purge").out
    assert "there was no previous state to delete" in call("forget", model, "--purge").out
    assert classes(call, model) == before
    assert_refused(call("undo", model), "nothing to undo")


def test_check_measures_the_others_and_relearning(call: Call, model: Path, tmp_path: Path) -> None:
    unseen = images(tmp_path / "unseen", ["cat", "dog", "bus", "van", "oak", "elm"], 5, seed=1)
    called = call("forget", model, "--class", "dog", "--check", unseen)
    assert called.code == 0
    lines = called.out.splitlines()
    assert lines[0].endswith("has forgotten dog; it knows 3 classes")
    assert lines[1].startswith("other classes on the --check images: ") and lines[1].endswith("(15 images)")
    assert lines[2] == "recognised if taught again from what is left:"
    assert lines[3].startswith("  forgotten classes: ") and lines[3].endswith("% of the images (1 classes)")
    assert lines[4].startswith("  classes never taught: ") and lines[4].endswith("(2 classes)")
    assert classes(call, model) == [["cat"], ["bus", "van"]]


def test_check_says_what_it_lacks(call: Call, model: Path, tmp_path: Path) -> None:
    called = call("forget", model, "--class", "dog", "--check", images(tmp_path / "a", ["dog"], 3))
    assert "other classes: not measured, --check has no images of them" in called.out
    assert "classes never taught: not measured, --check has none with two images" in called.out
    called = call("forget", model, "--class", "bus", "--check", images(tmp_path / "b", ["bus", "cat"], 1))
    assert (
        "relearning: not measured, --check has no class of the forgotten ones with two images" in called.out
    )
    assert "(1 images)" in called.out


def test_what_cannot_be_done_is_refused_and_changes_nothing(call: Call, model: Path, tmp_path: Path) -> None:
    before = on_disk(model)
    assert_refused(call("forget", model), "say what to forget", "--task NAME or --class NAME")
    assert_refused(call("forget", model, "--task", "pets", "--class", "cat"), "not both")
    assert_refused(call("forget", model, "--task", "birds"), "no task named 'birds'", "'pets', 'cars'")
    assert_refused(call("forget", model, "--class", "eel", "--purge"), "no class named 'eel'")
    assert_refused(call("forget", model, "--purge", "--check", tmp_path / "pets"), "--check")
    assert_refused(call("forget", model, "--task", "pets", "--check", tmp_path / "none"), "does not exist")
    assert_refused(call("forget", tmp_path / "nothing", "--task", "pets"), "no saved model")
    assert_refused(call("forget", tmp_path / "nothing", "--purge"), "no saved model")
    assert on_disk(model) == before
    assert not (tmp_path / "nothing").exists()
    assert call("forget", model, "--task", "pets").code == 0
    before = on_disk(model)
    assert_refused(call("forget", model, "--task", "cars"), "all that the model knows", "delete its folder")
    assert on_disk(model) == before


def test_a_file_of_values_says_class(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "forget.yaml").write_text("class: dog\n")
    assert call("forget", model, "--config", tmp_path / "forget.yaml").code == 0
    assert classes(call, model) == [["cat"], ["bus", "van"]]
