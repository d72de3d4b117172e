"""Which image files are decoded: formats and encodings whose cost in time and memory their header bounds.

Headers are read here, before any decoder sees the file: some decoders inflate a kilobyte to gigabytes, or
take minutes over what a header says, and a limit of pixels notices neither.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import BinaryIO

from duallora.data.jpeg2000 import refuse_jpeg2000
from duallora.data.tiff import refuse_exif, refuse_tiff
from duallora.errors import DualLoRAError

MOST_PARTS = 20_000
"""Segments, chunks or blocks that a file may have before and beside its pixels."""

MOST_HEADER = 32 << 20
"""Bytes of metadata that may stand before the pixels: colour profiles and previews of cameras fit well."""

_MOST_SCANS = 100
_MOST_SCANNED = 2_500_000_000  # pixels of all scans of a JPEG; ten are usual, of images of any size
_MOST_WORDS = 4096  # bytes of the header of a PPM, which are read one at a time
_SLOW_LEVELS = 4_000_000  # pixels of a PPM that are scaled to 8 bits one by one
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_CHUNK = 1 << 20
_SCAN, _END = 0xDA, 0xD9

Refuse = Callable[[BinaryIO], str | None]
"""Reads a file from its start; gives why it is not decoded, None where it may be."""


class _Filling(Exception):
    """Between two segments of a JPEG lie more bytes of filling than anybody writes."""


class Costly(DualLoRAError):
    """An image file is encoded so that decoding it could take any time or memory."""


def format_of(file: BinaryIO) -> str | None:
    """Pillow's name of a file's format by its first bytes; None for what is not decoded."""
    file.seek(0)
    head = file.read(32)
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return "AVIF"
    if re.match(rb"P[1-6f][\s#]", head):
        return "PPM"
    return "TGA" if _is_targa(head) else None


def refuse_costly(file: BinaryIO, kind: str, name: str) -> None:
    """Refuses encodings whose cost the header does not bound; leaves the file at its start.

    Args:
        file: that can be read anywhere.
        kind: from :func:`format_of`.
        name: what the message calls it.

    Raises:
        Costly: naming the file and the remedy.
    """
    file.seek(0)
    try:
        why = _REFUSALS[kind](file) if kind in _REFUSALS else None
    except _Filling:
        why = _TOO_MANY
    except struct.error:  # cut short; the decoder says so in its own words
        why = None
    finally:
        file.seek(0)
    if why is not None:
        raise Costly(f"{name} {why}, which could take any time or memory to decode: save it as PNG or JPEG")


def _is_targa(head: bytes) -> bool:
    if len(head) < 18:
        return False
    palette, kind, depth = head[1], head[2], head[16]
    size = struct.unpack_from("<HH", head, 12)
    return palette in (0, 1) and kind in (1, 2, 3, 9, 10, 11) and depth in (1, 8, 16, 24, 32) and all(size)


def _bmp(file: BinaryIO) -> str | None:
    file.seek(14)
    (size,) = struct.unpack("<I", file.read(4))
    if size < 40:
        return None  # the oldest form knows no compression
    file.seek(30)
    (compression,) = struct.unpack("<I", file.read(4))
    # 0 is none, 3 names the bits of each colour.
    return None if compression in (0, 3) else "is a compressed BMP"


def _ppm(file: BinaryIO) -> str | None:
    head = file.read(_MOST_WORDS)
    if head[:2] in (b"P1", b"P2", b"P3"):
        return "is a PPM of plain numbers"
    number = rb"(?:\s+|#[^\r\n]*[\r\n])+(\d{1,10})"
    wanted = number * (2 if head[:2] in (b"P4", b"Pf") else 3)
    found = re.match(rb"P." + wanted, head)
    if found is None:
        # A damaged one is told by the decoder, a long one is not.
        return None if len(head) < _MOST_WORDS else "is a PPM with a very long header"
    if len(found.groups()) < 3:
        return None
    width, height, levels = map(int, found.groups())
    if levels not in (255, 65535) and width * height > _SLOW_LEVELS:
        return f"is a PPM of {levels} levels"
    return None


def _gif(file: BinaryIO) -> str | None:
    head = file.read(13)
    file.seek(_palette(head[10]), os.SEEK_CUR)
    parts = 0
    while parts < MOST_PARTS:
        kind = file.read(1)
        if kind in (b",", b";", b""):  # the picture, or the end
            return None
        parts += 1
        if kind != b"!":  # the decoder passes over it, byte by byte
            continue
        file.read(1)
        while size := file.read(1).strip(b"\0"):
            file.seek(size[0], os.SEEK_CUR)
            parts += 1
            if parts > MOST_PARTS:
                break
    return _TOO_MANY


def _palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _png(file: BinaryIO) -> str | None:
    file.seek(8)
    others = pixels = 0
    while others <= MOST_PARTS:
        head = file.read(8)
        if len(head) < 8:
            return None
        size, kind = struct.unpack(">I4s", head)
        file.seek(size + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return None
        if kind in (b"IDAT", b"fdAT"):
            pixels += 1
            # Encoders write some kilobytes a chunk; each chunk costs as much as a kilobyte of pixels.
            if pixels > MOST_PARTS and pixels > file.tell() >> 9:
                return _TOO_MANY
        else:
            others += 1
    return _TOO_MANY


def _jpeg(file: BinaryIO) -> str | None:
    file.seek(2)
    area, exif = 0, b""
    for _ in range(MOST_PARTS):
        marker, size = _segment(file)
        if marker is None:
            return refuse_exif(exif)
        if file.tell() > MOST_HEADER:
            return "has more metadata than any camera writes"
        if marker == _SCAN:
            return refuse_exif(exif) or _scans(file, area)
        if marker == 0xE1 and size > 6:
            start = file.read(6)
            size -= 6
            if start == b"Exif\0\0":  # one that does not fit a segment goes on in the next
                exif += file.read(size)
                size = 0
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack(">BHH", file.read(5))
            area = height * width
            size -= 5
        file.seek(size, os.SEEK_CUR)
    return _TOO_MANY


def _segment(file: BinaryIO) -> tuple[int | None, int]:
    """The next marker of a JPEG and the bytes of its segment, which begins where the file is then.

    What lies between segments is passed over, byte by byte, as the decoder does.
    """
    for _ in range(MOST_PARTS):
        if file.read(1) != b"\xff":
            if _is_at_end(file):
                return None, 0
            continue
        code = file.read(1)
        if code == b"\xff":  # filling
            file.seek(-1, os.SEEK_CUR)
        elif code and not _is_alone(code[0]):
            return code[0], _length(file)
    raise _Filling


def _is_at_end(file: BinaryIO) -> bool:
    if not file.read(1):
        return True
    file.seek(-1, os.SEEK_CUR)
    return False


def _is_alone(marker: int) -> bool:
    """Whether a marker of a JPEG has no segment."""
    return marker <= 0x01 or 0xD0 <= marker <= 0xD9


def _length(file: BinaryIO) -> int:
    return int(max(struct.unpack(">H", file.read(2))[0] - 2, 0))


def _scans(file: BinaryIO, area: int) -> str | None:
    """Every scan of a JPEG goes over the whole picture, however little it says."""
    most = min(_MOST_SCANS, max(_MOST_SCANNED // max(area, 1), 1))
    scans = 1
    for _ in range(MOST_PARTS):
        marker = _marker_among_pixels(file)
        if marker is None or marker == _END:  # what follows is another picture, or a film
            return None
        scans += marker == _SCAN
        if scans > most:
            return f"has more than {most} scans"
        if not _is_alone(marker):
            file.seek(_length(file), os.SEEK_CUR)
    return _TOO_MANY


def _marker_among_pixels(file: BinaryIO) -> int | None:
    """The next marker, behind which the file is then; those inside pixels are stuffed and do not match."""
    size, last = 512, b""
    while part := file.read(size):
        found = _MARKER.search(last + part)
        if found is not None:
            file.seek(found.end() - len(last) - len(part), os.SEEK_CUR)
            return found[0][1]
        last = b"\xff" if part.endswith(b"\xff") else b""
        size = min(2 * size, _CHUNK)
    return None


_TOO_MANY = f"has more than {MOST_PARTS:,} parts beside its pixels"
_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
)
_REFUSALS: dict[str, Refuse] = {
    "BMP": _bmp,
    "GIF": _gif,
    "JPEG": _jpeg,
    "JPEG2000": refuse_jpeg2000,
    "PNG": _png,
    "PPM": _ppm,
    "TIFF": refuse_tiff,
}
