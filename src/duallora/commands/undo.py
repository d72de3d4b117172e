"""``duallora undo``: one step back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duallora.commands import console


def undo(model: Path) -> None:
    """Take a saved model back to the state before the last learn; one step is kept.

    Args:
        model: folder of the saved model
    """
    from duallora import checkpoint
    from duallora.commands.manifest import intact

    with intact(model):  # before anything is changed
        _names(checkpoint.read_manifest(model)["previous"])
    names = _names(checkpoint.undo(model))
    console.line(f"{model} is back at its state after {names[-1:] and names[-1]} (tasks: {', '.join(names)})")


def _names(manifest: dict[str, Any] | None) -> list[str]:
    return [str(task["name"]) for task in ({"tasks": []} if manifest is None else manifest)["tasks"]]
