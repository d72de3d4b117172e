"""``duallora undo``: one step back."""

from __future__ import annotations

from pathlib import Path

from duallora.commands import console


def undo(model: Path) -> None:
    """Take a saved model back to the state before the last learn or forget; one step is kept.

    Args:
        model: folder of the saved model
    """
    from duallora.sharing.place import own_folder
    from duallora.storage import checkpoint

    own_folder(model)
    with checkpoint.intact(model):  # before anything is changed
        previous = checkpoint.read_manifest(model).get("previous")
        names = [] if previous is None else [str(task["name"]) for task in previous["tasks"]]
        before = names[-1] if names else "nothing"
    checkpoint.undo(model)
    console.line(f"{model} is back at its state after {before} (tasks: {', '.join(names)})")
