"""What a TIFF file, and the metadata of other files, say of their size, and which of it is believed."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

MOST_TAG_BYTES = 64 << 20
"""Bytes of all entries of a directory: each may name the same bytes again, and each gets a copy of them."""

MOST_PIECE = 1 << 30
"""Bytes of a strip or a tile, which is decoded as a whole however small the picture is."""

_MOST_ENTRIES = 4096
_MOST_SAMPLES = 64
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = (
    *(256, 257, 258, 259, 277, 278),
    *(322, 323),
)
_DECISIVE = frozenset({_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT})
# None, fax, LZW, JPEG, deflate, PackBits. LZMA and Zstandard may ask for gigabytes whatever the picture is.
_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32773, 32946})
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_FORMS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}


def refuse_tiff(file: BinaryIO) -> str | None:
    """Why a TIFF file is not decoded; None where it may be, or where it is damaged.

    Only the first picture counts, which is the one that is read.
    """
    found = _directory(file)
    if isinstance(found, str):
        return found
    if found.get(_COMPRESSION, 1) not in _COMPRESSIONS:
        return "is a TIFF in a compression other than LZW, deflate, PackBits, JPEG or fax"
    width, height = found.get(_WIDTH, 0), found.get(_HEIGHT, 0)
    across, down = found.get(_TILE_WIDTH, width), found.get(_TILE_HEIGHT, 0)
    down = down or min(found.get(_ROWS, height), height)
    piece = across * down * max(found.get(_BITS, 8), 8) // 8 * max(found.get(_SAMPLES, 1), 1)
    if piece > MOST_PIECE or found.get(_SAMPLES, 1) > _MOST_SAMPLES:
        return "is a TIFF of pieces larger than 1 GB"
    return None


def refuse_exif(exif: bytes) -> str | None:
    """Why the metadata that cameras write is not read; None where it may be."""
    data = exif.removeprefix(b"Exif\0\0")
    try:
        found = _directory(io.BytesIO(data))
    except struct.error:  # broken metadata does not make the pixels unreadable
        return None
    return found if isinstance(found, str) else None


def _directory(file: BinaryIO) -> dict[int, int] | str:
    """The first value of those entries that matter, or what is wrong with the directory as a whole."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        return {}
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    count_form, entry_form, place = ("Q", "HHQ8s", 8) if big else ("H", "HHI4s", 4)
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), head, place)
    if start >= 1 << 62:
        return {}
    file.seek(start)
    (count,) = struct.unpack(order + count_form, file.read(struct.calcsize(order + count_form)))
    if count > _MOST_ENTRIES:
        return f"has a directory of more than {_MOST_ENTRIES:,} entries"
    size, held, found = struct.calcsize(order + entry_form), 0, {}
    for _ in range(count):
        tag, kind, number, value = struct.unpack(order + entry_form, file.read(size))
        bytes_ = number * _SIZES.get(kind, 1)
        # Numbers become Python's own, which take more room than in the file.
        held += bytes_ if kind in (1, 2, 6, 7) else 32 * number
        if kind in _FORMS and 0 < bytes_ <= len(value):
            (found[tag],) = struct.unpack_from(order + _FORMS[kind], value)
        elif tag == _BITS and kind == 3 and number <= _MOST_SAMPLES:
            found[tag] = _largest(file, order, value, number)
        elif tag in _DECISIVE:
            return "has a directory in a form that nobody writes"
    if held > _allowed(file):
        return "has a directory whose entries name more bytes than it holds"
    return found


def _largest(file: BinaryIO, order: str, place: bytes, number: int) -> int:
    """The largest of the bits of each colour, which lie elsewhere in the file."""
    here = file.tell()
    (start,) = struct.unpack(order + ("Q" if len(place) == 8 else "I"), place)
    file.seek(min(start, 1 << 62))
    data = file.read(2 * number)
    file.seek(here)
    largest: int = max(struct.unpack(f"{order}{number}H", data))
    return largest


def _allowed(file: BinaryIO) -> int:
    """Bytes that entries may have together: those of the file, and twice that for numbers."""
    place = file.tell()
    length = file.seek(0, 2)
    file.seek(place)
    return max(MOST_TAG_BYTES, min(4 * length, 16 * MOST_TAG_BYTES))
