"""What a saved model holds, as its method describes it, for ``duallora inspect``, the server and the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.methods import METHODS
from duallora.storage import checkpoint


def description(model: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a saved model holds, as JSON holds it.

    Args:
        model: its folder, for messages.
        manifest: content of ``model.json``.
        tensors: the saved weights, by name.

    Returns:
        Tasks, ``layers`` (one :class:`duallora.methods.interface.AdaptedPlace` each), ``bytes`` by part with
        their ``total``, and how the model was made.

    Raises:
        DualLoRAError: ``model.json`` lacks something, or names a method that is unknown here.
    """
    with checkpoint.intact(model):
        shown = ("name", "classes", "learned_at", "train_images")
        tasks = [{key: task[key] for key in shown} for task in manifest["tasks"]]
        about = {key: manifest[key] for key in ("method", "config", "seed", "augment", "backbone")}
        if about["method"] not in METHODS:
            raise DualLoRAError(f"the model uses method {about['method']!r}, unknown here.")
        method = METHODS[about["method"]].method
        layers = [asdict(place) for place in method.places(about["config"], tensors)]
        sizes: dict[str, int] = defaultdict(int)
        for name, tensor in tensors.items():
            sizes[method.part_of(name)] += tensor.numel() * tensor.element_size()
        total = {"total": sum(sizes.values())}
        return {"tasks": tasks, "layers": layers, "bytes": dict(sorted(sizes.items())) | total, **about}
