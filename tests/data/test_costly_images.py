"""Encodings that cost any time or memory are refused by their headers, and what is usual is still read."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora.data.encodings import Costly, format_of
from duallora.data.images import decode_image, read_image
from duallora.errors import DualLoRAError


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    target = io.BytesIO()
    (image or Image.new("RGB", (64, 48), (10, 200, 30))).save(target, kind, **options)
    return target.getvalue()


def bmp(width: int, height: int, compression: int, bits: int, data: bytes) -> bytes:
    colours = 1 << bits if bits <= 8 else 0
    start = 14 + 40 + 4 * colours
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + bytes(4 * colours) + data


def tiff(compression: int = 1, extra: tuple[tuple[int, int, int, int], ...] = (), **changed: int) -> bytes:
    tags = {256: 10, 257: 10, 258: 8, 259: compression, 262: 1, 277: 1, 273: 8, 278: 10, 279: 100}
    tags |= {int(name[1:]): value for name, value in changed.items()}
    entries = sorted([(tag, 4, 1, value) for tag, value in tags.items()] + list(extra))
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0) + bytes(20_000)


def many_tags(number: int, size: int) -> bytes:
    """A directory whose entries all name the same bytes, as a TIFF file or the metadata of another."""
    return tiff(extra=tuple((40_000 + i, 1, size, 8) for i in range(number))) + bytes(size)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    whole = encoded("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]  # after IHDR


def more_scans(scans: int) -> bytes:
    whole = encoded("JPEG", Image.new("RGB", (64, 64)), progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + b"\xff\xd9"


GIF = b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0)  # without a palette

COSTLY: dict[str, Callable[[], bytes]] = {
    "bmp in rle8": lambda: bmp(10_000_000, 1, 1, 8, b"\0\2\0\xff\0\1"),
    "bmp in rle4": lambda: bmp(40_000, 4000, 2, 4, b"\0\2\xff\xff\0\1"),
    "bmp that holds a jpeg": lambda: bmp(100, 100, 4, 24, encoded("JPEG")),
    "plain bitmap": lambda: b"P1 5000 3000\n" + b"#\n" * 500_000,
    "plain grey": lambda: b"P2\n4000 4000\n255\n" + b"1 " * 1000,
    "plain colour": lambda: b"P3\n4000 4000\n255\n" + b"1 2 3 " * 1000,
    "long header of a ppm": lambda: b"P6\n" + b"# nothing\n" * 5000 + b"2 2 255\n" + bytes(12),
    "many odd levels": lambda: b"P5 4000 4000 254\n" + bytes(4000),
    "tiff in lzma": lambda: tiff(34925),
    "tiff in zstandard": lambda: tiff(50000),
    "tiff in webp": lambda: tiff(50001),
    "tiff with a huge tile": lambda: tiff(8, t322=60_000, t323=60_000),
    "tiff with many names for the same bytes": lambda: many_tags(2000, 400_000),
    "tiff with too many entries": lambda: many_tags(9000, 1),
    "jpeg with many names for the same bytes": lambda: (
        b"\xff\xd8" + segments(b"Exif\0\0" + many_tags(3000, 200_000)) + encoded("JPEG")[2:]
    ),
    "jpeg of tiny segments": lambda: b"\xff\xd8" + b"\xff\xe5\0\3a" * 30_000 + encoded("JPEG")[2:],
    "jpeg with filling": lambda: b"\xff\xd8\xff" + b"\xff" * 300_000 + b"\xe5\0\3a" + encoded("JPEG")[2:],
    "jpeg of many scans": lambda: more_scans(300),
    "jpeg of many scans behind a marker that stands alone": lambda: hidden(more_scans(300), b"\xff\xd0"),
    "jpeg of many scans behind junk": lambda: hidden(more_scans(300), b"junk\xff\0"),
    "jpeg of junk": lambda: hidden(encoded("JPEG"), b"j" * 100_000),
    "tiff with a huge tile of signed numbers": lambda: tiff(extra=((322, 9, 1, 60_000), (323, 9, 1, 60_000))),
    "tiff with a tile that lies elsewhere": lambda: tiff(extra=((322, 16, 1, 8), (323, 16, 1, 8))),
    "gif of comments behind junk": lambda: GIF + b"x" + b"!\xfe\1a\0" * 30_000 + b",",
    "gif of junk": lambda: GIF + b"x" * 100_000 + b",",
    "gif of comments": lambda: GIF + b"!\xfe\1a\0" * 30_000 + b",",
    "gif of one endless comment": lambda: GIF + b"!\xfe" + b"\1a" * 60_000,
    "png of empty chunks": lambda: png(chunk(b"abCd") * 30_000),
    "jpeg 2000 of tiny tiles": lambda: many_tiles(),
    "jpeg 2000 of many boxes": lambda: jp2_boxes(5000),
}


def segments(data: bytes) -> bytes:
    size = 65_000
    start, rest = data[:6], data[6:]
    parts = [rest[i : i + size] for i in range(0, len(rest), size)]
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 8) + start + p for p in parts)


def hidden(jpeg: bytes, junk: bytes) -> bytes:
    """A JPEG with something before its tables that a decoder passes over."""
    place = jpeg.index(b"\xff\xdb")
    return jpeg[:place] + junk + jpeg[place:]


def many_tiles() -> bytes:
    """Honest but for the numbers in its header: 8,000 x 8,000 pixels in tiles of 2 x 2."""
    whole = bytearray(encoded("JPEG2000", no_jp2=True))
    place = whole.index(b"\xff\x51") + 6
    struct.pack_into(">IIIIIIII", whole, place, 8000, 8000, 0, 0, 2, 2, 0, 0)
    return bytes(whole)


def jp2_boxes(number: int) -> bytes:
    whole = encoded("JPEG2000")
    place = whole.index(b"jp2h") - 4
    return whole[:place] + struct.pack(">I4s", 8, b"free") * number + whole[place:]


@pytest.mark.parametrize("name", COSTLY)
def test_what_no_header_bounds_is_refused_at_once(name: str) -> None:
    data = COSTLY[name]()
    begin = time.process_time()
    with pytest.raises(Costly, match=r"^photo\.x (is|has) .*: save it as PNG or JPEG$"):
        decode_image(data, "photo.x")
    assert time.process_time() - begin < 5  # seconds of computing; the decoders take minutes for some of them


HONEST: dict[str, Callable[[], bytes]] = {
    "bmp": lambda: encoded("BMP"),
    "bmp with a palette": lambda: encoded("BMP", Image.new("RGB", (9, 9)).quantize(4)),
    "dib": lambda: encoded("BMP", Image.new("L", (5, 5))),
    "ppm with a comment": lambda: b"P6\n# from a camera\n2 2\n255\n" + bytes(12),
    "pgm of 16 bits": lambda: b"P5 3 3 65535\n" + bytes(18),
    "pgm of odd levels": lambda: b"P5 30 30 100\n" + bytes(900),
    "pbm": lambda: b"P4 9 9\n" + bytes(18),
    "pfm": lambda: b"Pf\n3 3\n-1.0\n" + bytes(36),
    **{
        f"tiff in {name}": (lambda n=name: encoded("TIFF", compression=n))
        for name in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg")
    },
    "tiff in fax": lambda: encoded("TIFF", Image.new("1", (40, 40)), compression="group4"),
    "progressive jpeg": lambda: encoded("JPEG", progressive=True),
    "jpeg with exif and a profile": lambda: encoded(
        "JPEG", exif=b"Exif\0\0" + many_tags(2, 100)[:40_000], icc_profile=bytes(200_000)
    ),
    "jpeg with a film behind it": lambda: encoded("JPEG") + b"\xff\xda" * 5000,
    "jpeg with a preview": lambda: encoded("JPEG", exif=b"Exif\0\0" + tiff()[:400] + encoded("JPEG") * 20),
    "tiff in colour, in tiles of its writer": lambda: encoded(
        "TIFF", Image.new("RGB", (3000, 2000)), compression="tiff_lzw"
    ),
    "gif with a comment": lambda: encoded("GIF", comment=b"a" * 3000),
    "film": lambda: encoded(
        "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48), (i, 0, 0)) for i in range(30)]
    ),
    "png with text": lambda: png(*(chunk(b"tEXt", b"Title\0" + bytes([65 + i]) * 99) for i in range(26))),
    "webp": lambda: encoded("WEBP"),
    "lossless webp": lambda: encoded("WEBP", lossless=True),
    "jpeg 2000": lambda: encoded("JPEG2000"),
    "jpeg 2000 in tiles": lambda: encoded("JPEG2000", tile_size=(32, 32)),
    "jpeg 2000 without boxes": lambda: encoded("JPEG2000", no_jp2=True),
    "tga": lambda: encoded("TGA"),
    "tga in rle": lambda: encoded("TGA", compression="tga_rle"),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_is_usual_is_read(name: str) -> None:
    assert decode_image(HONEST[name](), "photo").mode == "RGB"


@pytest.mark.parametrize("name", HONEST)
def test_cut_and_changed_headers_end_in_one_sentence(name: str) -> None:
    whole = HONEST[name]()
    rng = np.random.default_rng(len(whole))
    for _ in range(20):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, min(len(data), 200), 3):
            data[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(data), "photo", 10_000_000)
        except DualLoRAError as error:
            assert str(error).startswith("photo ")


def test_metadata_that_would_swell_is_left_out_and_the_picture_read() -> None:
    huge = many_tags(3000, 200_000)
    assert decode_image(png(chunk(b"eXIf", huge)), "photo").size == (64, 48)


def test_libtiff_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    whole = encoded("TIFF", compression="tiff_lzw")
    data = bytearray(whole)
    data[8:60] = b"\xff" * 52
    broken = tiff(8, t273=5000, t279=300)
    for each in (bytes(data), broken, whole[:300]):
        with pytest.raises(DualLoRAError):
            decode_image(each, "scan.tif")
    assert capfd.readouterr() == ("", "")


def test_the_name_of_a_file_says_nothing_of_its_format(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(COSTLY["bmp in rle8"]())
    with pytest.raises(Costly, match="photo"):
        read_image(path)
    assert format_of(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(100))) is None
