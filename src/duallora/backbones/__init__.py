"""Frozen vision transformers: which there are, where their weights come from, what they compute."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone, BackboneInfo, load_backbone

__all__ = ["Backbone", "BackboneInfo", "load_backbone"]


def __getattr__(name: str) -> Any:
    # The list of backbones is read without PyTorch, which takes seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("duallora.backbones.backbone"), name)
