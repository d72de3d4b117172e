"""A learner in forms that need none of this package: a graph of all it computes, or its update for peft."""

from __future__ import annotations

from duallora.export.graph import (
    METADATA,
    OUTPUTS,
    Exported,
    Format,
    export,
    metadata,
    to_onnx,
    to_torch,
    traced,
)

__all__ = [
    "METADATA",
    "OUTPUTS",
    "Exported",
    "Format",
    "export",
    "metadata",
    "to_onnx",
    "to_torch",
    "traced",
]
