"""Folders of images as data sets and as streams."""

from __future__ import annotations

import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image

from duallora import streams
from duallora.errors import DualLoRAError


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        blue = zlib.crc32(Path(name).name.encode()) % 256
        for i in range(count):
            Image.new("RGB", (2, 2), (i, 0, blue)).save(root / name / f"{i:03d}.png")
    return root


class TestFolder:
    def test_classes_paths_and_identifiers(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"zebra": 2, "ant/deep": 1, "ant": 1, ".git": 1, "Übergröße": 1})
        (tmp_path / "README.md").write_text("beside the class folders")
        (tmp_path / "zebra" / ".DS_Store").write_bytes(b"\0")
        data = streams.FolderDataset(tmp_path)
        assert data.classes == ["ant", "zebra", "Übergröße"]
        assert data.identifiers == [
            "ant/000.png",
            "ant/deep/000.png",
            "zebra/000.png",
            "zebra/001.png",
            unicodedata.normalize("NFC", "Übergröße/000.png"),
        ]
        assert data.targets == [0, 0, 1, 1, 2]
        assert data[3][0].getpixel((0, 0))[0] == 1
        assert streams.as_task_dataset(data).identifiers == data.identifiers

    def test_decomposed_unicode_is_the_same_class(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {unicodedata.normalize("NFD", "Größe"): 1})
        assert streams.FolderDataset(tmp_path).classes == [unicodedata.normalize("NFC", "Größe")]

    def test_two_spellings_of_one_name_are_refused(self, tmp_path: Path) -> None:
        names = {unicodedata.normalize(form, "Größe"): 1 for form in ("NFC", "NFD")}
        write_folder(tmp_path, names)
        if len(list(tmp_path.iterdir())) < 2:
            pytest.skip("this file system takes both spellings for one")
        with pytest.raises(DualLoRAError, match="comes twice"):
            streams.FolderDataset(tmp_path)

    def test_missing_and_empty_folders_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DualLoRAError, match="gone does not exist"):
            streams.FolderDataset(tmp_path / "gone")
        with pytest.raises(DualLoRAError, match="has no class folders"):
            streams.FolderDataset(tmp_path)
        write_folder(tmp_path, {"ant": 1, "bee": 0})
        with pytest.raises(DualLoRAError, match="bee has no readable image"):
            streams.FolderDataset(tmp_path)
        with pytest.raises(DualLoRAError, match="is a file"):
            streams.FolderDataset(tmp_path / "ant" / "000.png")

    def test_non_image_files_are_named_or_skipped(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"ant": 1})
        (tmp_path / "ant" / "notes.txt").write_text("no image")
        with pytest.raises(
            streams.BadImagesError, match=r"notes\.txt is not an image: remove it \(1 bad file in "
        ):
            streams.FolderDataset(tmp_path)
        data = streams.FolderDataset(tmp_path, skip_bad_images=True)
        assert data.bad_images == [tmp_path / "ant" / "notes.txt"]
        assert len(data) == 1

    def test_corrupt_files_are_found_named_or_skipped(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"ant": 3, "bee": 1})
        cut = tmp_path / "ant" / "001.png"
        cut.write_bytes(cut.read_bytes()[:-30])
        (tmp_path / "ant" / "link.png").symlink_to(tmp_path / "gone.png")
        huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + huge
        (tmp_path / "bee" / "huge.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        )
        data = streams.FolderDataset(tmp_path)
        assert [path.name for path in data.find_bad_images()] == ["001.png", "link.png", "huge.png"]
        with pytest.raises(streams.BadImagesError, match=r"001\.png cannot be decoded.*3 bad files in "):
            data.check()
        assert len(data) == 6

        data = streams.FolderDataset(tmp_path, skip_bad_images=True)
        tracked: list[Path] = []
        data.check(lambda paths: (tracked.append(path) or path for path in paths))
        assert len(tracked) == 6
        assert [path.name for path in data.bad_images] == ["001.png", "link.png", "huge.png"]
        assert data.identifiers == ["ant/000.png", "ant/002.png", "bee/000.png"]
        assert data.targets == [0, 0, 1]
        data.check()
        assert len(data.bad_images) == 3

    def test_a_class_of_bad_images_alone_is_refused(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"ant": 1, "bee": 1})
        (tmp_path / "bee" / "000.png").write_bytes(b"broken")
        data = streams.FolderDataset(tmp_path, skip_bad_images=True)
        with pytest.raises(DualLoRAError, match="bee has no readable image"):
            data.check()

    def test_good_folders_pass_the_check(self, tmp_path: Path) -> None:
        data = streams.FolderDataset(write_folder(tmp_path, {"ant": 2}))
        data.check()
        assert len(data) == 2

    @pytest.mark.parametrize("name", ["val", "test"])
    def test_layouts(self, tmp_path: Path, name: str) -> None:
        flat = write_folder(tmp_path / "flat", {"ant": 1})
        assert streams.train_and_val(flat) == (flat, None)
        assert streams.evaluation_folder(flat) == flat
        both = write_folder(tmp_path / "both", {"train/ant": 1})
        assert streams.train_and_val(both) == (both / "train", None)
        assert streams.evaluation_folder(both) == both / "train"
        write_folder(both, {f"{name}/ant": 1})
        assert streams.train_and_val(both) == (both / "train", both / name)
        assert streams.evaluation_folder(both) == both / name
        with pytest.raises(DualLoRAError, match="does not exist"):
            streams.train_and_val(tmp_path / "gone")

    def test_classes_may_be_called_train_and_test(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 1, "test": 1, "car": 1})
        assert streams.train_and_val(tmp_path) == (tmp_path, None)
        assert streams.evaluation_folder(tmp_path) == tmp_path


class TestLoad:
    def test_digits(self) -> None:
        stream = streams.load("digits", order="alphabetical", classes=5, train_per_class=5)
        assert (stream.name, stream.augmentation, stream.order_seed) == ("digits", "crop", "alphabetical")
        assert len(streams.load("digits", tasks=1)) == 1
        with pytest.raises(DualLoRAError, match="5 tasks need at least 5 classes"):
            streams.load("digits", classes=3)

    def test_digits_in_domains(self) -> None:
        stream = streams.load("digits", domains=("photo", "edges"), classes=3)
        assert [task.name for task in stream] == ["photo", "edges"]
        assert stream.name == "digits (photo, edges)"
        assert stream.augmentation == "crop"
        assert streams.load("digits", tasks=2, domains=("photo", "edges")).tasks[1].name == "edges"
        with pytest.raises(DualLoRAError, match="2 domains make 2 tasks"):
            streams.load("digits", tasks=3, domains=("photo", "edges"))

    def test_a_folder_with_train_and_val(self, tmp_path: Path) -> None:
        names = [f"class {i:02d}" for i in range(10)]
        write_folder(tmp_path, {f"{part}/{name}": 6 for part in ("train", "val") for name in names})
        stream = streams.load(str(tmp_path), train_per_class=4)
        assert stream.name == tmp_path.name
        assert [len(task.train) for task in stream] == [4] * 10
        assert [len(task.test) for task in stream] == [6] * 10
        assert stream.order_seed == 1993

    def test_holdout_leaves_val_unread(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train/ant": 6, "train/bee": 6, "val/unknown": 1, "val/empty": 0})
        stream = streams.load(str(tmp_path), tasks=2, order="7", train_per_class=3, holdout=2)
        task = next(task for task in stream if task.train.classes == ["bee"])
        assert task.train.identifiers == ["bee/000.png", "bee/001.png", "bee/002.png"]
        assert task.test.identifiers == ["bee/003.png", "bee/004.png"]
        assert stream.order_seed == 7

    def test_a_folder_without_val_tests_on_every_fifth(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"ant": 5, "bee": 5})
        stream = streams.load(str(tmp_path), tasks=2)
        assert [(len(task.train), len(task.test)) for task in stream] == [(4, 1), (4, 1)]

    def test_unknown_streams_and_orders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DualLoRAError, match="neither 'digits' nor an existing folder"):
            streams.load(str(tmp_path / "gone"))
        with pytest.raises(DualLoRAError, match='a number or "alphabetical"'):
            streams.load("digits", order="random")
