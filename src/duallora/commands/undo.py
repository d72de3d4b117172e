"""``duallora undo``: one step back."""

from __future__ import annotations

from pathlib import Path

from duallora.commands import console


def undo(model: Path) -> None:
    """Take a saved model back to the state before the last learn; one step is kept.

    Args:
        model: folder of the saved model
    """
    from duallora import checkpoint

    names = [task["name"] for task in checkpoint.undo(model)["tasks"]]
    console.line(f"{model} is back at its state after {names[-1]} (tasks: {', '.join(names)})")
