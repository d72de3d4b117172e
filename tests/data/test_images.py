"""Every kind of image is read as plain RGB, or refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duallora.data import images
from duallora.data.images import find_images, read_image, to_pil
from duallora.errors import DualLoRAError


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_huge_png(path: Path, width: int, height: int) -> None:
    """A valid file that claims so many pixels and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def gradient(size: int = 32) -> Image.Image:
    values = np.linspace(0, 255, size * size * 3).reshape(size, size, 3).astype(np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "tga"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    gradient().save(path)
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.full((5, 7), 204)  # a level of the palette too
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    elif mode == "I":
        image = Image.fromarray((grey * 257).astype(np.int32))
    elif mode == "F":
        image = Image.fromarray((grey / 255).astype(np.float32))
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    # Pillow 12 cannot read its own TIFF files in YCbCr.
    path = tmp_path / ("image.jpg" if mode == "YCbCr" else "image.tiff")
    image.save(path)
    for read in (read_image(path), to_pil(image)):
        assert (read.mode, read.size) == ("RGB", (7, 5))
        if mode != "1":
            assert np.abs(np.asarray(read).astype(int) - 204).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_16_bit_colour_is_scaled_to_8_bits(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    pixel = struct.pack(">HHH", 0, 32768, 65535)
    data = zlib.compress(b"\0" + pixel)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    )
    assert read_image(path).getpixel((0, 0)) == (0, 128, 255)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK").save(path)
    pixel = np.asarray(read_image(path))[8, 8].astype(int)
    assert np.abs(pixel - [250, 20, 20]).max() < 6


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (255, 0, 0, 0))
    clear.save(tmp_path / "rgba.png")
    palette = clear.convert("RGB").quantize(2)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((1, 0)))
    clear.convert("RGB").save(tmp_path / "key.png", transparency=(255, 0, 0))
    assert np.asarray(read_image(tmp_path / "rgba.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert read_image(tmp_path / "palette.png").getpixel((1, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "black")]
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(path)).min() > 250


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png").getpixel((0, 0)) == (1, 2, 3)


def test_orientation_is_applied_once(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png", "turned.tiff"):
        image.save(tmp_path / name, exif=exif)
        read = read_image(tmp_path / name)
        assert read.size == (2, 4)
        assert to_pil(read).size == (2, 4)
        with Image.open(tmp_path / name) as opened:
            assert to_pil(opened).size == (2, 4)


def test_broken_metadata_does_not_matter(tmp_path: Path) -> None:
    gradient().save(tmp_path / "image.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert read_image(tmp_path / "image.jpg").size == (32, 32)


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\nxxxx"]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange.jpg"
    path.write_bytes(content)
    with pytest.raises(DualLoRAError, match=r"strange\.jpg"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DualLoRAError, match=f"cut.{suffix}"):
        read_image(path)


def test_huge_images_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    write_huge_png(path, 100_000, 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DualLoRAError, match=r"huge.png has more than 178,956,970 pixels"):
            read_image(path)


def test_warnings_of_pillow_alone_are_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a file is read: other threads have something to say meanwhile."""
    gradient().save(tmp_path / "image.png")
    plain_rgb = images._plain_rgb

    def warned(image: Image.Image) -> Image.Image:
        warnings.warn_explicit("odd metadata", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
        with pytest.raises(UserWarning, match="elsewhere"):
            warnings.warn("elsewhere", stacklevel=1)
        return plain_rgb(image)

    monkeypatch.setattr(images, "_plain_rgb", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            read_image(tmp_path / "image.png")
            assert sum(each[3] == images._PILLOW for each in warnings.filters) == 1


def test_the_limit_does_not_depend_on_a_global_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    write_huge_png(tmp_path / "huge.png", 100_000, 100_000)
    with pytest.raises(DualLoRAError, match="pixels"):
        read_image(tmp_path / "huge.png")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DualLoRAError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(DualLoRAError, match="gone does not exist"):
        find_images(tmp_path / "gone")


def test_tensors() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4) * 10
    assert torch.equal(torch.from_numpy(np.array(to_pil(pixels))), pixels.permute(1, 2, 0))
    assert to_pil(pixels.float() / 255).tobytes() == to_pil(pixels).tobytes()
    assert to_pil(pixels[0]).tobytes() == to_pil(pixels[:1]).tobytes()
    assert to_pil(pixels[0]).mode == "RGB"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 8, 8),
        torch.zeros(1, 3, 8, 8),
        torch.zeros(3, 0, 8),
        torch.full((3, 8, 8), 2.0),
        torch.full((3, 8, 8), float("nan")),
        torch.zeros(3, 8, 8, dtype=torch.int64),
    ],
)
def test_unfit_tensors_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(DualLoRAError, match="tensor must"):
        to_pil(tensor)


def test_to_pil_takes_paths_and_refuses_the_rest(tmp_path: Path) -> None:
    gradient().save(tmp_path / "image.png")
    assert to_pil(str(tmp_path / "image.png")).tobytes() == gradient().tobytes()
    with pytest.raises(DualLoRAError, match="not int"):
        to_pil(3)  # type: ignore[arg-type]


def test_find_images_walks_sorted_and_skips_hidden(tmp_path: Path) -> None:
    wanted = ["a/1.JPG", "a/deep/2.png", "b.webp"]
    for name in [*wanted, ".hidden.png", ".git/3.png", "__MACOSX/4.png", "notes.txt", "a/Thumbs.db"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == wanted
