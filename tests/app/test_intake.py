"""What is given to be taught: sorting into classes, unreadable files, copies, twins, hostile zips."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora import DualLoRAError
from duallora.app import uploads as uploads_module
from duallora.app.intake import EVERY, Check, Draft, by_class
from duallora.app.uploads import Found, Uploads, files_of


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    (tmp_path / "uploads").mkdir()
    found = Uploads(tmp_path / "uploads")
    yield found
    found.close()


def scene(seed: int, size: int = 48) -> Image.Image:
    """A picture with structure: coarse random patches, smoothed."""
    patches = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC)


def written(folder: Path, name: str, seed: int, **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scene(seed).save(folder / name, **options)
    return folder / name


def loose(*paths: Path) -> list[list[Found]]:
    return [[Found(path, (path.name,)) for path in paths]]


def zipped(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    scene(seed).save(buffer, "PNG")
    return buffer.getvalue()


def checked(*classes: tuple[str, list[Path]]) -> Check:
    draft = Draft()
    for name, paths in classes:
        draft.add(loose(*paths), name)
    return draft.check()


# -- sorting ------------------------------------------------------------------------------------------------


def names(*shown: str) -> list[Found]:
    return [Found(Path("/x") / name, tuple(name.split("/"))) for name in shown]


@pytest.mark.parametrize(
    ("files", "name", "classes"),
    [
        (["a.png", "b.png"], "robin", {"robin": 2}),
        (["box/a.png", "box/b.png"], "", {"box": 2}),
        (["box/a.png", "box/b.png"], "robin", {"robin": 2}),
        (["box/robin/a.png", "box/wren/b.png"], "", {"robin": 1, "wren": 1}),
        (["box/birds/robin/a.png", "box/birds/wren/b.png"], "", {"robin": 1, "wren": 1}),
        (["box/robin/day/a.png", "box/robin/night/b.png", "box/wren/c.png"], "", {"robin": 2, "wren": 1}),
        (["box/robin/a.png"], "", {"robin": 1}),
        (["box/a.png", "box/more/b.png"], "", {"box": 2}),
        (["box/train/robin/a.png", "box/train/wren/a.png"], "", {"robin": 1, "wren": 1}),
        (["box/train/a.png", "box/test/a.png", "box/car/a.png"], "", {"train": 1, "test": 1, "car": 1}),
    ],
    ids=str,
)
def test_files_are_sorted_into_classes(files: list[str], name: str, classes: dict[str, int]) -> None:
    found = by_class(names(*files), name, [])
    assert {key: len(own) for key, own in found.items()} == classes


def test_what_is_not_done_as_asked_is_noted() -> None:
    notes: list[str] = []
    found = by_class(names("box/x.png", "box/robin/a.png", "box/wren/b.png"), "bird", notes)
    assert set(found) == {"robin", "wren"}
    assert notes == [
        "1 file beside the class folders of box is left out.",
        "The class name bird is not used: the folders name 2 classes.",
    ]


def test_files_without_a_name_and_divided_folders_are_refused() -> None:
    with pytest.raises(DualLoRAError, match="no class name"):
        by_class(names("a.png"), "  ", [])
    with pytest.raises(DualLoRAError, match="give its train/ alone"):
        by_class(names("box/train/robin/a.png", "box/val/robin/b.png"), "", [])
    for train, held in (("Train", "Valid"), ("training", "Validation")):
        with pytest.raises(DualLoRAError, match=f"holds {train}/ and {held}/; give its {train}/ alone"):
            by_class(names(f"box/{train}/robin/a.png", f"box/{held}/robin/b.png"), "", [])
    with pytest.raises(DualLoRAError, match="may be classes or parts"):
        by_class(names("box/train/steam/a.png", "box/bus/b.png"), "", [])
    with pytest.raises(DualLoRAError, match="no class folders"):
        by_class(names("box/Train/a.png", "box/Val/b.png"), "", [])
    with pytest.raises(DualLoRAError, match="no file"):
        Draft().add([], "robin")


def test_the_same_class_grows_and_a_refused_name_adds_nothing(tmp_path: Path) -> None:
    draft = Draft()
    draft.add(loose(written(tmp_path, "1.png", 1)), "robin")
    draft.add(loose(written(tmp_path, "1.png", 1), written(tmp_path, "2.png", 2)), " robin ")
    assert [len(each.images) for each in draft.check().classes] == [2]
    with pytest.raises(DualLoRAError, match="control characters"):
        draft.add(loose(written(tmp_path, "3.png", 3)), "a\tb")
    assert list(draft.files) == ["robin"]
    assert draft.remove("robin") == [tmp_path / "1.png", tmp_path / "2.png"] and not draft.files


# -- the check ----------------------------------------------------------------------------------------------


def test_unreadable_files_are_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.png").write_bytes(png()[:90])
    good = written(tmp_path, "good.png", 1)
    check = checked(("robin", [good, tmp_path / "notes.txt", tmp_path / "broken.png"]))
    (only,) = check.classes
    assert [seen.name for seen in only.images] == ["good.png"]
    reasons = {seen.name: seen.reason for seen in only.unreadable}
    assert "not an image" in str(reasons["notes.txt"]) and "cannot be decoded" in str(reasons["broken.png"])
    assert check.refusal() is None
    train, held = check.divided()
    assert (len(train), held) == (1, None)


def test_a_class_without_a_readable_image_cannot_be_learned(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    check = checked(("robin", [written(tmp_path, "1.png", 1)]), ("wren", [tmp_path / "broken.png"]))
    assert "wren has no readable image" in str(check.refusal())
    with pytest.raises(DualLoRAError, match="wren has no readable image"):
        check.divided()
    assert "no classes" in str(Check((), ()).refusal())


def test_every_fifth_image_of_a_class_is_held_back(tmp_path: Path) -> None:
    sizes = {"few": EVERY - 1, "five": EVERY, "many": 12}
    classes = [
        (name, [written(tmp_path / name, f"{i:02}.png", 100 * k + i) for i in range(size)])
        for k, (name, size) in enumerate(sizes.items())
    ]
    check = checked(*classes)
    assert [each.held_back for each in check.classes] == [0, 1, 2]
    assert check.smallest.name == "few" and check.images == 21
    train, held = check.divided()
    assert held is not None
    assert [held.classes[t] for t in held.targets] == ["five", "many", "many"]
    assert held.identifiers == ["04.png", "04.png", "09.png"]
    assert len(train) == 18
    backwards = checked(*[(name, paths[::-1]) for name, paths in classes]).divided()[1]
    assert backwards is not None and backwards.identifiers == held.identifiers


def test_copies_within_a_class_count_once(tmp_path: Path) -> None:
    paths = [written(tmp_path, "a.png", 1), written(tmp_path, "b.png", 1), written(tmp_path, "c.png", 2)]
    check = checked(("robin", paths))
    assert len(check.classes[0].images) == 2 and check.classes[0].repeated == ("b.png",)
    assert check.twins == ()


def test_pictures_that_two_classes_share_are_found(tmp_path: Path) -> None:
    first = [written(tmp_path / "a", f"{i}.png", i) for i in range(6)]
    same = written(tmp_path / "b", "same.png", 0)
    again = tmp_path / "b" / "again.jpg"
    scene(1, 40).save(again, quality=70)
    other = [written(tmp_path / "b", f"{i}.png", i) for i in range(20, 26)]
    check = checked(("robin", first), ("wren", [same, again, *other]))
    assert [(t.first[1], t.second[1], t.exact) for t in check.twins] == [
        ("0.png", "same.png", True),
        ("1.png", "again.jpg", False),
    ]
    assert {(t.first[0], t.second[0]) for t in check.twins} == {("robin", "wren")}


def test_pictures_without_structure_and_of_other_colours_are_no_twins(tmp_path: Path) -> None:
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    scene(1).save(tmp_path / "scene.png")
    dark = scene(1).point(lambda value: value // 3)
    dark.save(tmp_path / "dark.png")
    first = [tmp_path / "red.png", tmp_path / "scene.png"]
    assert checked(("robin", first), ("wren", [tmp_path / "blue.png", tmp_path / "dark.png"])).twins == ()


# -- zips and folders ---------------------------------------------------------------------------------------


def test_a_zip_of_class_folders(uploads: Uploads, tmp_path: Path) -> None:
    entries = {
        "birds/robin/1.png": png(1),
        "birds/wren/1.png": png(2),
        "birds/wren/2.png": png(3),
        "__MACOSX/birds/robin/._1.png": b"x",
        "birds/robin/.DS_Store": b"x",
        "birds/Thumbs.db": b"x",
    }
    found = uploads.unpack(zipped(tmp_path / "birds.zip", **entries), "birds.zip")
    draft = Draft()
    assert draft.add([found], "") == []
    assert {each.name: len(each.images) for each in draft.check().classes} == {"robin": 1, "wren": 2}
    assert all(uploads.holds(each.path) for each in found)
    uploads.discard(each.path for each in found)
    assert list(uploads.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../out.png", "robin/../../out.png", "..\\out.png"])
def test_a_zip_that_leads_out_of_itself_is_refused(uploads: Uploads, tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "evil.zip", **{"ok.png": png(), name: png()})
    with pytest.raises(DualLoRAError, match="leads out of it"):
        uploads.unpack(path, "evil.zip")
    assert list(uploads.folder.iterdir()) == []
    assert not list(tmp_path.rglob("out.png"))


def test_an_absolute_name_in_a_zip_stays_inside(uploads: Uploads, tmp_path: Path) -> None:
    (found,) = uploads.unpack(zipped(tmp_path / "a.zip", **{"/etc/robin.png": png()}), "a.zip")
    assert found.parts == ("a", "etc", "robin.png") and uploads.holds(found.path)


def test_a_link_in_a_zip_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        entry = zipfile.ZipInfo("robin.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(DualLoRAError, match="leads out of it"):
        uploads.unpack(tmp_path / "link.zip", "link.zip")


def test_a_zip_that_is_none_or_too_much_is_refused(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK but not really")
    with pytest.raises(DualLoRAError, match="no zip archive"):
        uploads.unpack(tmp_path / "no.zip", "no.zip")
    path = zipped(tmp_path / "many.zip", **{f"{i}.png": b"\0" * 1000 for i in range(5)})
    monkeypatch.setattr(uploads_module, "MOST_FILES", 4)
    with pytest.raises(DualLoRAError, match="5 files, more than 4"):
        uploads.unpack(path, "many.zip")
    monkeypatch.setattr(uploads_module, "MOST_FILES", 5)
    monkeypatch.setattr(uploads_module, "MOST_BYTES", 4500)
    with pytest.raises(DualLoRAError, match="unpacks to more"):
        uploads.unpack(path, "many.zip")
    assert list(uploads.folder.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_could_inflate_without_a_bound_is_refused(
    uploads: Uploads, tmp_path: Path, method: int
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(), zipfile.ZIP_DEFLATED)
        archive.writestr("b.png", bytes(50_000_000), method)
    assert (tmp_path / "a.zip").stat().st_size < 20_000
    with pytest.raises(DualLoRAError, match=r"a\.zip is packed with (bzip2|LZMA); make the zip again"):
        uploads.unpack(tmp_path / "a.zip", "a.zip")
    assert list(uploads.folder.iterdir()) == []


def test_the_usual_ways_to_pack_are_read(uploads: Uploads, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(), zipfile.ZIP_DEFLATED)
        archive.writestr("b.png", png(), zipfile.ZIP_STORED)
    assert [found.name for found in uploads.unpack(tmp_path / "a.zip", "a.zip")] == ["a/a.png", "a/b.png"]


def test_an_encrypted_zip_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    data = bytearray(zipped(tmp_path / "a.zip", **{"a.png": png()}).read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1  # the flag of both headers
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DualLoRAError, match="encrypted"):
        uploads.unpack(tmp_path / "a.zip", "a.zip")


def test_files_of_a_folder_stay_where_they_are(uploads: Uploads, tmp_path: Path) -> None:
    written(tmp_path / "birds" / "robin", "1.png", 1)
    written(tmp_path / "birds" / "wren", "1.png", 2)
    found = files_of(tmp_path / "birds")
    assert [each.parts for each in found] == [("birds", "robin", "1.png"), ("birds", "wren", "1.png")]
    uploads.discard(each.path for each in found)
    assert all(each.path.exists() for each in found)
    with pytest.raises(DualLoRAError, match="does not exist"):
        files_of(tmp_path / "nowhere")


def test_classes_are_added_all_or_none(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            written(tmp_path / "pets" / name, f"{number}.png", number)
    reads = []

    def read(path: Path) -> Image.Image:
        reads.append(path)
        if len(reads) == 5:
            raise MemoryError
        return Image.open(path)

    draft = Draft()
    with pytest.raises(MemoryError):
        draft.add([files_of(tmp_path / "pets")], "", read)
    assert draft.files == {}
    assert list(draft.adding([files_of(tmp_path / "pets")], "")) == [(done, 6) for done in range(6)]
    assert {name: len(own) for name, own in draft.files.items()} == {"cat": 3, "dog": 3}
