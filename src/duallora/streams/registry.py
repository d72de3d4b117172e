"""The streams by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.archives import ARCHIVES
from duallora.streams.by_path import FOLDER, is_table
from duallora.streams.cifar import CIFAR
from duallora.streams.collection import StreamEntry
from duallora.streams.cub import CUB
from duallora.streams.digits import DIGITS, DIGITS_ENTRY
from duallora.streams.domain_sets import DOMAIN_SETS
from duallora.streams.hugging_face import HUB
from duallora.streams.imagenet_r import IMAGENET_R
from duallora.streams.permuted_digits import PERMUTED_DIGITS_ENTRY
from duallora.streams.tiny_imagenet import TINY_IMAGENET

STREAMS: dict[str, StreamEntry] = {
    entry.name: entry
    for entry in (
        DIGITS_ENTRY,
        PERMUTED_DIGITS_ENTRY,
        *CIFAR,
        IMAGENET_R,
        TINY_IMAGENET,
        CUB,
        *DOMAIN_SETS,
        *ARCHIVES,
        FOLDER,
        HUB,
    )
}
"""Every stream there is, by the name that ``duallora streams`` shows."""


def find_entry(stream: str) -> tuple[StreamEntry, str]:
    """The entry that a name or a path means, and what was written after the prefix.

    A name wins over a folder of the same name, which ``folder:`` still reaches.

    Raises:
        DualLoRAError: it is neither; the message has the nearest names.
    """
    if stream in STREAMS and ":" not in stream:
        return STREAMS[stream], ""
    prefix, colon, rest = stream.partition(":")
    for entry in (FOLDER, HUB):
        if colon and prefix == entry.name.partition(":")[0]:
            return entry, rest
    if Path(stream).is_dir() or is_table(Path(stream)):
        return FOLDER, stream
    near = difflib.get_close_matches(stream, STREAMS)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise DualLoRAError(
        f"unknown stream {stream!r}: it is neither {DIGITS!r} nor an existing folder, nor another name that "
        f"`duallora streams` lists{hint}"
    )
