"""The folder in which a saved model can be read, wherever the model is."""

from __future__ import annotations

from pathlib import Path

from duallora.sharing.hub import fetch
from duallora.sharing.place import HubPlace, on_hub


def local_folder(model: str | Path) -> Path:
    """The folder in which a saved model can be read; one on the hub is brought into the hub's cache.

    Args:
        model: a folder, or ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``.

    Raises:
        DualLoRAError: the name is none, or the model is not there or cannot be fetched.
    """
    if not on_hub(model):
        return Path(model)
    return fetch(HubPlace.parse(str(model)))
