"""What is sent of a saved model: one state of it, and its card."""

from __future__ import annotations

from pathlib import Path

from duallora.sharing.card import model_card
from duallora.sharing.place import HubPlace
from duallora.storage import checkpoint
from duallora.storage.atomic import write_atomic
from duallora.storage.copied import copy_state, require_free
from duallora.storage.soundness import check


def prepare(model: Path, target: Path, place: HubPlace, licence: str | None) -> str:
    """Writes what is sent of a model into a new folder.

    Args:
        model: the model's folder.
        target: a folder that is empty or does not exist.
        place: where it will be, for the card.
        licence: of the model, as the hub names it; None for none.

    Returns:
        In words, how many files of how many bytes.

    Raises:
        DualLoRAError: the model is not sound, has learned nothing or changes meanwhile, the licence is no
            name, or the target holds something.
    """
    require_free(target)
    manifest, tensors = checkpoint.read(model)
    check(model, manifest, tensors)
    card = model_card(model, manifest, tensors, place, licence)  # before anything is written
    copy_state(model, target, manifest)
    write_atomic(target / "README.md", card.encode())
    files = [path for path in sorted(target.iterdir()) if not path.name.startswith(".")]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
