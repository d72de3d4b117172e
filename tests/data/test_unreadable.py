"""Files that are read by no decoder here, links to folders, and grey of any depth."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora import DualLoRAError, streams
from duallora.data.images import decode_image, find_images, read_image, to_pil
from duallora.data.unreadable import foreign_kind, left_out


def container(brand: bytes, *more: bytes) -> bytes:
    """The beginning of an ISO media file."""
    body = brand + b"\0" * 4 + b"".join(more)
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"\0" * 200


HEADS = {
    "HEIC": container(b"heix", b"mif1"),
    "HEIF": container(b"mif1", b"miaf"),
    "a video": container(b"isom", b"mp41"),
    "JPEG XL": b"\xff\x0a" + b"\0" * 40,
    "a Photoshop document": b"8BPS\0\1" + b"\0" * 40,
    "a PDF document": b"%PDF-1.7\n",
    "SVG": b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="x"/>',
    "DICOM": b"\0" * 128 + b"DICM" + b"\0" * 40,
    "OpenEXR": b"\x76\x2f\x31\x01" + b"\0" * 40,
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["photo.jpg", "photo.bin"])
def test_a_file_is_named_as_what_it_is_whatever_its_name(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HEADS[kind])
    with pytest.raises(DualLoRAError, match=rf"{name} is {kind}, which is not read here: convert it to JPEG"):
        read_image(tmp_path / name)
    with pytest.raises(DualLoRAError, match=f"sent is {kind}"):
        decode_image(HEADS[kind], "sent")


def test_a_compatible_brand_says_more_than_the_general_one() -> None:
    assert foreign_kind(container(b"mif1", b"heic")) == "HEIC"
    assert foreign_kind(container(b"mif1", b"avif")) == "AVIF"
    assert foreign_kind(b"") is None and foreign_kind(b"\x89PNG\r\n\x1a\n") is None


def test_a_broken_image_of_a_known_format_is_only_broken(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 and then nothing")
    with pytest.raises(DualLoRAError, match="repair or remove it"):
        read_image(tmp_path / "a.jpg")


def test_class_folders_and_counts_name_them_too(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "IMG_7.HEIC").write_bytes(HEADS["HEIC"])
    (tmp_path / "cat" / "old.heif").write_bytes(b"?")
    with pytest.raises(DualLoRAError, match="is HEIC, which is not read here: convert it"):
        streams.FolderDataset(tmp_path)
    assert len(streams.FolderDataset(tmp_path, skip_bad_images=True)) == 1
    told = left_out([tmp_path / "cat" / name for name in ("IMG_7.HEIC", "notes.txt", "old.heif")])
    assert told.startswith("3 files are left out") and "1 of them HEIC: convert" in told and "HEIF" in told


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    top, disk = tmp_path / "pets" / "cat", tmp_path / "disk"
    for name in ("cat/a.png", "cat/in/b.png", "../disk/c.png", "../disk/deep/d.png", "dog/e.png"):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (top / "more").symlink_to(disk)
    (top / "again").symlink_to(disk / "deep")  # comes before "more": still each image once
    (top / "up").symlink_to("..")
    (top / "in" / "self").symlink_to(".")
    (disk / "deep" / "back").symlink_to(disk)
    (disk / "round").symlink_to(top)
    (top / "gone").symlink_to(tmp_path / "nowhere")
    found = [path.name for path in find_images(top)]
    assert sorted(found) == ["a.png", "b.png", "c.png", "d.png"]
    assert all(path.is_relative_to(top) for path in find_images(top))
    (tmp_path / "link").symlink_to(top)
    assert sorted(path.name for path in find_images(tmp_path / "link")) == sorted(found)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    "grey",
    [
        (RAMP * 255).astype(np.int32),
        (RAMP * 1023).astype(np.int32),
        (RAMP * 4095).astype(np.int32),
        (RAMP * 65535).astype(np.int32),
        (RAMP * 900_000).astype(np.int32),
        (RAMP * 2_000_000_000).astype(np.int32),
        (RAMP * 4071 - 1000).astype(np.int32),
        (RAMP).astype(np.float32),
        (RAMP * 1.0001).astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 65535).astype(np.float32),
        (RAMP * 3e7).astype(np.float32),
        (RAMP * 2 - 1).astype(np.float32),
        (RAMP * 3000 - 1024).astype(np.float32),
    ],
    ids=lambda grey: f"{grey.dtype}:{grey.min():g}..{grey.max():g}",
)
def test_deep_grey_keeps_its_order_and_its_levels(grey: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(grey).save(tmp_path / "deep.tiff")
    for read in (to_pil(Image.fromarray(grey)), read_image(tmp_path / "deep.tiff")):
        found = np.asarray(read)[..., 0].ravel().astype(int)
        assert np.all(np.diff(found) >= 0)
        assert found[0] <= 1 and found[-1] >= 120
        assert len(set(found.tolist())) >= 110


def test_values_that_are_no_numbers_hide_nothing() -> None:
    grey = (RAMP * 300).astype(np.float32)
    grey[0, 0], grey[0, 1], grey[0, 2] = np.nan, np.inf, -np.inf
    found = np.asarray(to_pil(Image.fromarray(grey)))[..., 0]
    assert found.max() > 120 and len(set(found.ravel().tolist())) > 100
    assert not np.asarray(to_pil(Image.fromarray(np.full((4, 4), np.nan, np.float32)))).any()
    mask = np.eye(4, dtype=np.int32)
    assert set(np.asarray(to_pil(Image.fromarray(mask))).ravel().tolist()) == {0, 255}


def test_dark_16_bit_grey_stays_as_it_is(tmp_path: Path) -> None:
    values = (RAMP * 500).astype(np.uint16)
    for suffix in ("png", "pgm", "tiff"):
        data = io.BytesIO()
        Image.fromarray(values).save(data, {"png": "PNG", "pgm": "PPM", "tiff": "TIFF"}[suffix])
        assert np.array_equal(np.asarray(decode_image(data.getvalue(), "a"))[..., 0], values >> 8)
