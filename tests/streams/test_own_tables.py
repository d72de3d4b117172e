"""Tables that people write: spellings of paths, unicode, backslashes, copies."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import Dataset

from duallora import DualLoRAError, streams


def image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 9, 200)).save(path)


def table(folder: Path, *lines: str, header: str = "path,label,split") -> str:
    (folder / "list.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(folder / "list.csv")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for c, name in enumerate(("ant", "bee")):
        for i in range(5):
            image(tmp_path / "photos" / name / f"{i}.png", 100 * c + 7 * i)
    yield tmp_path


def rows(split: str = "train") -> list[str]:
    return [f"photos/{c}/{i}.png,{c},{split}" for c in ("ant", "bee") for i in range(5)]


@pytest.mark.parametrize(
    "spelling",
    [
        "./photos/ant/1.png",
        "photos//ant/1.png",
        "photos/./ant/1.png",
        "photos/bee/../ant/1.png",
        "{top}/photos/ant/1.png",
        "photos\\ant\\1.png",
        "linked/ant/1.png",
        "same.png",
    ],
)
def test_one_image_under_two_spellings_is_refused(spelling: str, folder: Path) -> None:
    (folder / "linked").symlink_to("photos")
    (folder / "same.png").symlink_to("photos/ant/1.png")
    written = table(folder, *rows(), f"{spelling.format(top=folder)},ant,test")
    with pytest.raises(DualLoRAError, match=r"line 12 of .* a second time"):
        streams.load(written, tasks=1)


def test_backslashes_are_read_as_slashes_where_that_file_is_there(folder: Path) -> None:
    image(folder / "photos" / "ant" / "odd\\name.png", 77)
    lines = [line.replace("/", "\\") for line in rows()]
    stream = streams.load(table(folder, *lines, "photos/ant/odd\\name.png,ant,test"), tasks=1)
    assert stream.tasks[0].test.identifiers == ["photos/ant/odd\\name.png"]
    assert "photos/bee/4.png" in stream.tasks[0].train.identifiers


@pytest.mark.parametrize(
    "wrong", ["C:\\photos\\ant\\1.png", "photos/ant", "photos/ant/9.png", "/nowhere/1.png", ".."]
)
def test_what_is_not_there_is_said_without_archives(wrong: str, folder: Path) -> None:
    with pytest.raises(DualLoRAError, match="names 1 of 11 images that are not in") as caught:
        streams.load(table(folder, *rows(), f"{wrong},ant,train"), tasks=1)
    assert "archive" not in str(caught.value) and "with / between folders" in str(caught.value)


def test_labels_and_paths_are_compared_in_composed_unicode(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    for i in range(4):
        image(tmp_path / apart / f"{i}.png", 20 * i)
    lines = [f"{(composed, apart)[i % 2]}/{i}.png,{(apart, composed)[i % 2]} ,train" for i in range(4)]
    stream = streams.load(table(tmp_path, *lines), tasks=1, holdout=1)
    assert stream.class_order == (composed,)
    assert all(name.startswith(composed) for name in stream.tasks[0].train.identifiers)


def test_data_sets_of_python_have_composed_names_too() -> None:
    class One(Dataset[tuple[Image.Image, int]]):
        classes, targets = (unicodedata.normalize("NFD", "é "),), (0,)

        def __len__(self) -> int:
            return 1

    assert streams.as_task_dataset(One()).classes == ["é"]


def test_names_that_differ_in_case_alone_get_a_hint(folder: Path) -> None:
    lines = [line.replace(",bee,", ",ANT,") for line in rows()]
    with pytest.warns(UserWarning, match="'ant' and 'ANT'|'ANT' and 'ant'"):
        assert len(streams.load(table(folder, *lines), tasks=1).class_order) == 2


def test_copies_in_both_parts_are_counted(folder: Path) -> None:
    for i in (0, 3):
        (folder / f"copy{i}.png").write_bytes((folder / "photos" / "bee" / f"{i}.png").read_bytes())
    lines = [*rows(), "copy0.png,bee,test", "copy3.png,bee,test"]
    with pytest.warns(UserWarning, match=r"2 images to test on are .*copy0\.png, which is .*0\.png"):
        streams.load(table(folder, *lines), tasks=1)


def test_copies_in_folders_are_counted_where_the_split_is_ours(folder: Path) -> None:
    data = (folder / "photos" / "ant" / "0.png").read_bytes()
    (folder / "photos" / "ant" / "4.png").write_bytes(data)  # the fifth image is tested on
    with pytest.warns(UserWarning, match="1 image to test on is byte for byte"):
        streams.load(str(folder / "photos"), tasks=1)


def test_different_images_get_no_warning(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streams.load(str(folder / "photos"), tasks=1)
        streams.load(table(folder, *rows()[:9], "photos/bee/4.png,bee,VALID"), tasks=1)
