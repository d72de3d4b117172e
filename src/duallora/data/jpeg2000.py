"""What a JPEG 2000 file says of its tiles, blocks and layers, which cost time and memory even where empty."""

from __future__ import annotations

import struct
from typing import BinaryIO

MOST_BLOCKS = 4_000_000
"""Blocks, packets and tiles that a picture may be made of: at the usual 64 x 64 more than are decoded."""

_MOST_BOXES = 1000
_MOST_HEADER = 4 << 20
_MOST_MARKERS = 10_000
_SOC, _SIZ, _COD, _COC, _SOT, _SOD = 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93


def refuse_jpeg2000(file: BinaryIO) -> str | None:
    """Why a JPEG 2000 file is not decoded; None where it may be, or where it is damaged."""
    file.seek(0)
    if file.read(2) != b"\xff\x4f":
        file.seek(0)
        if not _to_codestream(file):
            return "has a very long header"
        file.read(2)
    size = coding = b""
    for _ in range(_MOST_MARKERS):
        marker, length = struct.unpack(">HH", file.read(4))
        if marker == _SOT:
            file.seek(-4, 1)
            costly = _is_costly(size, coding)
            return "is a JPEG 2000 of very many blocks" if costly or _tiles_differ(file) else None
        data = file.read(max(length - 2, 0))
        if marker == _SIZ:
            size = data
        elif marker == _COD:
            coding = data
        elif marker == _COC:
            return "is a JPEG 2000 whose colours are encoded in different ways"
    return "has a very long header"


def _to_codestream(file: BinaryIO) -> bool:
    """Goes to the pixels of the boxed form; whether they come soon enough."""
    for _ in range(_MOST_BOXES):
        length, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            head = 16
        if kind == b"jp2c":
            return True
        if kind == b"jp2h" and length > _MOST_HEADER:  # boxes again, which the decoder reads one by one
            return False
        if length < head or length >= 1 << 62:
            raise struct.error  # damaged, which the decoder says
        file.seek(length - head, 1)
    return False


def _is_costly(size: bytes, coding: bytes) -> bool:
    _, *grid, colours = struct.unpack_from(">HIIIIIIIIH", size)
    right, bottom, left, top, tile_width, tile_height, *_ = grid
    width, height = max(right - left, 1), max(bottom - top, 1)
    tile_width, tile_height = max(min(tile_width, width), 1), max(min(tile_height, height), 1)
    style, _, layers, _, levels, across, down = struct.unpack_from(">BBHBBBB", coding)
    block = 1 << (across % 16 + down % 16 + 4)
    if style & 1:  # precincts have sizes of their own
        precincts = coding[10 : 11 + levels] or b"\xff"
        block = min(block, *(1 << max((each & 15) + (each >> 4), 0) for each in precincts))
    tiles = -(-width // tile_width) * -(-height // tile_height)
    packets = tiles * colours * (levels + 1) * max(layers, 1)
    blocks: int = width * height * colours // block + packets
    return blocks > MOST_BLOCKS or bool(levels > 32)


def _tiles_differ(file: BinaryIO) -> bool:
    """Whether a tile is encoded in a way of its own, or there are too many parts of tiles to look at."""
    looked = 0
    while looked < _MOST_MARKERS:
        looked += 1
        start = file.tell()
        head = file.read(12)
        if len(head) < 12 or head[:2] != b"\xff\x90":
            return False
        (length,) = struct.unpack_from(">I", head, 6)
        while looked < _MOST_MARKERS:
            looked += 1
            (marker,) = struct.unpack(">H", file.read(2))
            if marker == _SOD:
                break
            if marker in (_COD, _COC):
                return True
            (skipped,) = struct.unpack(">H", file.read(2))
            file.seek(max(skipped - 2, 0), 1)
        if not length:  # the last part goes on to the end
            return False
        if length < 14:
            return False  # damaged
        file.seek(start + length)
    return True
