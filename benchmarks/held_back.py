"""Streams tested on training images that are not learned: what choices are made on."""

from __future__ import annotations

from typing import Any

from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.run_setting import load_setting

STREAMS: dict[str, dict[str, Any]] = {
    "random": {"tasks": 10, "order": 1993, "domains": None, "classes": None},
    "semantic": {"tasks": 10, "order": "alphabetical", "domains": None, "classes": None},
    "domains": {
        "tasks": None,
        "order": 1993,
        "domains": "photo,edges,negative,pixelated,posterised",
        "classes": 20,
    },
}


def load(stream: str, folder: str, train_per_class: int = 60) -> Any:
    """The setting of a stream: the first images of each class are learned, fifty others are asked about."""
    options = StreamOptions(folder, train_per_class=train_per_class, holdout=50, **STREAMS[stream])
    return load_setting(options, BackboneOptions(augment="crop,flip"))
