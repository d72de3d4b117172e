"""One image with two labels is refused with the reason, whatever a user's images come from."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
from command_line import assert_refused, images
from PIL import Image

from duallora import DualLoRAError
from duallora.runtime.progress import Progress
from duallora.streams import copies, load
from duallora.streams.copies import read_once
from duallora.streams.labels import two_labels
from duallora.teaching.training_images import TrainingImages


def test_only_equal_bytes_with_different_labels_are_found(tmp_path):
    for name, content in {"a": b"one", "b": b"one", "c": b"two", "d": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (tmp_path / name for name in "abcd")
    once = read_once()
    assert two_labels([(a, "x"), (b, "x"), (c, "y"), (None, "z"), (None, "w")], once) == []
    assert two_labels([(a, "x"), (b, "x"), (c, "y"), (d, "y")], once) == [((a, "x"), (d, "y"))]
    assert two_labels([(a, "x"), (a, "y")], once) == [((a, "x"), (a, "y"))]
    assert two_labels([(tmp_path / "gone", "x"), (tmp_path / "gone", "y")], once) == []


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_same_file_in_two_class_folders_is_refused(tmp_path, part):
    images(tmp_path / "train", ["ant", "bee"], 6)
    images(tmp_path / "val", ["ant", "bee"], 2, seed=1)
    load(str(tmp_path), tasks=1)
    shutil.copy(tmp_path / "train" / "ant" / "000.png", tmp_path / part / "bee" / "other.png")
    with pytest.raises(DualLoRAError, match=r"1 image has two labels.*ant and bee: an image has one label"):
        load(str(tmp_path), tasks=1)


@pytest.mark.parametrize("second", ["a.png,bee", "copy.png,bee"])
def test_a_table_that_names_one_image_twice_is_refused(tmp_path, second):
    images(tmp_path, ["ant", "bee"], 6)
    for name in ("a.png", "copy.png"):
        shutil.copy(tmp_path / "ant" / "000.png", tmp_path / name)
    table = tmp_path / "table.csv"
    rows = [f"{name}/{number:03d}.png,{name}" for name in ("ant", "bee") for number in range(1, 6)]
    table.write_text("\n".join(["path,label", "a.png,ant", *rows, second]) + "\n")
    with pytest.raises(DualLoRAError, match=r"ant.*bee|bee.*ant") as refused:
        load(str(table), tasks=1)
    assert "one label" in str(refused.value)


@pytest.mark.parametrize("held_out", ["val", "train"])
def test_a_file_is_hashed_once(tmp_path, monkeypatch, held_out):
    """Labels and copies are looked at one after the other, and read each file of equal size once for both."""
    for part in {"train", held_out}:
        images(tmp_path / part, ["ant", "bee"], 10, seed=len(part))
        for path in (tmp_path / part).glob("*/*.png"):
            with Image.open(path) as image:
                image.save(path.with_suffix(".bmp"))
            path.unlink()
    bitmaps = set(tmp_path.glob("*/*/*.bmp"))
    assert len({path.stat().st_size for path in bitmaps}) == 1
    real, hashed = copies.sha256_of, Counter()

    def counted(path):
        hashed[path] += 1
        return real(path)

    monkeypatch.setattr(copies, "sha256_of", counted)
    load(str(tmp_path), tasks=1)
    assert hashed == Counter(bitmaps)
    hashed.clear()
    TrainingImages.read(tmp_path, Progress(quiet=True), skip_bad_images=False)
    assert hashed == Counter(bitmaps)


def test_commands_refuse_it(call, tmp_path):
    clean = images(tmp_path / "clean", ["ant", "bee"])
    assert call("learn", tmp_path / "model", clean, "--epochs", 1, "--method.min_steps", 0).code == 0
    folder = images(tmp_path / "images", ["ant", "bee"], seed=1)
    shutil.copy(folder / "ant" / "000.png", folder / "bee" / "zzz.png")
    assert_refused(call("learn", tmp_path / "new", folder), "two labels", "ant and bee")
    assert_refused(call("learn", tmp_path / "model", clean, "--name", "b", "--check", folder), "two labels")
    assert_refused(call("evaluate", tmp_path / "model", folder), "two labels")
    assert not (tmp_path / "new").exists()
