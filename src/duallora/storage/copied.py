"""One state of a saved model, copied into a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.storage import checkpoint
from duallora.storage.atomic import chunks_of, exclusive, reason, replace_file, sync_folder
from duallora.storage.soundness import check

Checked = tuple[dict[str, Any], dict[str, Tensor]]
"""The manifest and the tensors of a model whose hashes and shapes have been looked at."""


def copy_current(source: Path, target: Path) -> Checked:
    """Copies the current state of a saved model, and nothing else of its folder, into a new folder.

    Only files that ``model.json`` names are copied, byte for byte; ``model.json`` itself loses the state
    before, whose files stay behind. An interruption leaves the target without ``model.json``.

    Args:
        source: the model's folder.
        target: a folder that is empty or does not exist.

    Returns:
        What was copied.

    Raises:
        DualLoRAError: the source is no sound model or changes meanwhile, or the target is in use, holds
            something or cannot be written.
    """
    require_free(target)
    manifest, tensors = checkpoint.read(source)
    check(source, manifest, tensors)
    copy_state(source, target, manifest)
    return manifest, tensors


def copy_state(source: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """As :func:`copy_current`, for a caller that has read the state and checked it.

    Each file is read once more, to be written, and compared with its hash on the way.

    Args:
        source: the model's folder.
        target: a folder that is empty or does not exist.
        manifest: as ``checkpoint.read`` gave it.

    Raises:
        DualLoRAError: the source has changed meanwhile, or the target is in use, holds something or cannot be
            written.
    """
    with exclusive(target):
        require_free(target)
        try:
            for name, digest in manifest["files"].items():
                if not _is_copied(source / name, target / name, digest):
                    raise DualLoRAError(f"{source / name} has changed meanwhile; repeat the command.")
            sync_folder(target)
            current = json.dumps({**manifest, "previous": None}, indent=2) + "\n"
            replace_file(target / "model.json", [current.encode()])
            sync_folder(target)
        except OSError as error:
            raise DualLoRAError(f"the model could not be copied to {target}: {reason(error)}.") from error


def _is_copied(source: Path, target: Path, digest: str) -> bool:
    """Copies a file; whether it was there still, and was the one with that sha256."""
    try:
        return replace_file(target, chunks_of(source)) == digest
    except FileNotFoundError:
        if source.exists():
            raise
        return False  # two changes of the model delete what was read before them


def require_free(folder: Path) -> None:
    """Refuses a folder that a new model cannot go into: one with other files than a kill has left.

    Raises:
        DualLoRAError: naming what is there.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DualLoRAError(f"{folder} is a file; name a folder for the model.")
    if (folder / "model.json").exists():
        raise DualLoRAError(f"{folder} holds a saved model already; name a new folder.")
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    others = [name for name in names if not checkpoint.OWN_FILE.fullmatch(name)]
    if others:
        raise DualLoRAError(
            f"{folder} is no saved model and holds other files ({others[0]}); name a new folder for the "
            "model."
        )
