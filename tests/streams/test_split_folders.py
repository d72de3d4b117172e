"""Folders called train, val and test under their usual names; what could mean two things is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from duallora import DualLoRAError, streams
from duallora.streams.split_folders import role


def lay(folder: Path, *names: str) -> Path:
    """A folder with an empty file or a small image under each name."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(
            (name, "train")
            for name in ("train", "Train", "TRAINING", "train_set", "Training Data", "train2017")
        ),
        *(
            (name, "val")
            for name in ("val", "valid", "Validation", "VAL", "validation-set", "val2017", "eval")
        ),
        *((name, "test") for name in ("test", "Tests", "testing", "test_images", "TestSet")),
        *((name, None) for name in ("trainer", "trains a", "valve", "tester", "contest", "data", "set", "")),
    ],
)
def test_the_usual_names_in_any_case(name: str, part: str | None) -> None:
    assert role(name) == part


@pytest.mark.parametrize("train", ["Train", "training", "TRAIN_SET"])
@pytest.mark.parametrize("held", ["Valid", "VALIDATION", "Testing", "eval"])
def test_both_parts_are_found(train: str, held: str, tmp_path: Path) -> None:
    lay(tmp_path, f"{train}/ant/1.png", f"{train}/bee/1.png", f"{held}/ant/2.png", "notes.png")
    assert streams.train_and_val(tmp_path) == (tmp_path / train, tmp_path / held)
    assert streams.evaluation_folder(tmp_path) == tmp_path / held


def test_validation_goes_before_test_and_empty_folders_count_for_nothing(tmp_path: Path) -> None:
    lay(tmp_path, "Train/ant/1.png", "Test/ant/2.png")
    (tmp_path / "valid").mkdir()
    (tmp_path / "logs").mkdir()
    assert streams.train_and_val(tmp_path)[1] == tmp_path / "Test"
    lay(tmp_path, "valid/ant/3.png")
    assert streams.train_and_val(tmp_path)[1] == tmp_path / "valid"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("train/steam/1.png", "bus/1.png", "car/1.png"),
            r"beside it, bus/ and car/ .* put them into train/",
        ),
        (("train/a/1.png", "Train/a/2.png"), "may mean the same"),
        (("train/a/1.png", "val/a/2.png", "valid/a/3.png"), "val/ and valid/, which may mean the same"),
        (("train/a/1.png", "test/1.png"), "beside it, test/"),
        (("ant/1.png", "bee/1.png", "Test/ant/2.png"), "ant/ and bee/"),
        (("train/1.png", "val/1.png"), "no class folders"),
        (("Training/1.png", "Validation/1.png", "Test/3.png"), "no class folders"),
        (("train/1.png", "val/a/1.png"), "beside it, train/"),
        (("valid/a/1.png",), "no train/"),
    ],
)
def test_what_could_mean_two_things_is_refused(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    lay(tmp_path, *names)
    with pytest.raises(DualLoRAError, match=words) as caught:
        streams.train_and_val(tmp_path)
    assert "\n" not in str(caught.value)


def test_parts_are_never_taken_for_classes(tmp_path: Path) -> None:
    lay(tmp_path, "Training/ant/1.png", "Validation/ant/2.png")
    with pytest.raises(DualLoRAError, match="part of a data set"):
        streams.FolderDataset(tmp_path)


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    lay(tmp_path, "train/1.png", "bus/1.png", "Test/1.png")
    assert streams.train_and_val(tmp_path) == (tmp_path, None)
    assert streams.FolderDataset(tmp_path).classes == ["Test", "bus", "train"]


def test_training_images_are_never_measured_on_in_silence(tmp_path: Path) -> None:
    lay(tmp_path, "Train/ant/1.png")
    for folder in (tmp_path, tmp_path / "Train"):
        with pytest.warns(UserWarning, match="training images") as told:
            assert streams.evaluation_folder(folder) == tmp_path / "Train"
        assert len(told) == 1
    lay(tmp_path, "Valid/ant/1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert streams.evaluation_folder(tmp_path) == tmp_path / "Valid"


def test_a_held_out_folder_that_leads_to_the_training_images_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, "train/ant/1.png")
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(DualLoRAError, match="lead to the same images"):
        streams.train_and_val(tmp_path)


def test_images_beside_the_class_folders_are_counted(tmp_path: Path) -> None:
    lay(tmp_path, "ant/1.png", "bee/1.png", "loose.png", "more.png")
    with pytest.warns(UserWarning, match="2 images beside the class folders"):
        assert len(streams.FolderDataset(tmp_path)) == 2
