"""``duallora inspect``: what a saved model holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console

if TYPE_CHECKING:
    from torch import Tensor


def inspect(model: Path, *, json: bool = False) -> None:
    """Show what a saved model holds: tasks, classes, dates, ranks and bases per layer, bytes per part.

    Args:
        model: folder of the saved model
        json: print one JSON document
    """
    from duallora.storage import checkpoint
    from duallora.storage.soundness import check

    manifest, tensors = checkpoint.read(model)
    check(model, manifest, tensors)
    about = description(model, manifest, tensors)
    with checkpoint.intact(model):
        heading = f"method {about['method']}, backbone {about['backbone']['name']}"
        cells = [
            [str(t["name"]), str(t["learned_at"]), str(t["train_images"]), ", ".join(t["classes"])]
            for t in about["tasks"]
        ]
        layers, sizes = about["layers"], about["bytes"]
    if json:
        console.document(about)
        return
    console.line(heading)
    console.rows(["task", "learned at", "images", "classes"], cells)
    if layers:
        console.rows(
            ["layer", "projections", "rank", "residual ranks", "bases", "free directions"],
            [
                [
                    str(layer["layer"]),
                    layer["projections"],
                    str(layer["rank"]),
                    " ".join(map(str, layer["residual_ranks"])),
                    " ".join(map(str, layer["bases"])),
                    "" if layer["free"] is None else str(layer["free"]),
                ]
                for layer in layers
            ],
        )
    console.rows(["part", "bytes"], [[part, f"{size:,}"] for part, size in sizes.items()])


def description(model: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a saved model holds, as JSON holds it.

    Args:
        model: its folder, for messages.
        manifest: content of ``model.json``.
        tensors: the saved weights, by name.

    Raises:
        DualLoRAError: ``model.json`` lacks something.
    """
    from duallora.storage import checkpoint

    with checkpoint.intact(model):
        shown = ("name", "classes", "learned_at", "train_images")
        tasks = [{key: task[key] for key in shown} for task in manifest["tasks"]]
        about = {key: manifest[key] for key in ("method", "config", "seed", "augment", "backbone")}
        return {"tasks": tasks, "layers": layers_of(tensors), "bytes": bytes_of(tensors), **about}


def layers_of(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Describes every adapted place of a saved model.

    Args:
        tensors: the saved weights, by name.

    Returns:
        One entry a layer and group of projections: ``rank`` of the accumulated update, ``residual_ranks`` and
        ``bases`` (directions that a task added) per task, ``free`` directions left (None without bases).
    """
    places: dict[tuple[int, str], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "layers" and rest.count(".") > 1:  # of DualLoRA; other methods have no groups
            layer, group, part = rest.split(".", 2)
            places[int(layer), group.removeprefix("group_")][part] = tensor
    return [
        {
            "layer": layer,
            "projections": group,
            "rank": _rank(parts),
            "residual_ranks": _residual_ranks(parts),
            "bases": parts["sizes"].tolist() if "sizes" in parts else [],
            "free": parts["phi"].shape[0] - parts["phi"].shape[1] if "phi" in parts else None,
        }
        for (layer, group), parts in sorted(places.items())
    ]


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of a saved model by part, and in ``total``."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        sizes[_part(name)] += tensor.numel() * tensor.element_size()
    return {part: sizes[part] for part in sorted(sizes)} | {"total": sum(sizes.values())}


def _part(name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind != "layers":
        return {"rows": "class rows", "random": "random features"}.get(kind, kind)
    part = rest.split(".")[2 if rest.count(".") > 1 else 1]
    return (
        "bases" if part in ("phi", "sizes", "basis") else "residual" if part == "residual" else "orthogonal"
    )


def _rank(parts: Mapping[str, Tensor]) -> int:
    """Rank of the update that is added to the frozen weight."""
    import torch

    if "dense" in parts:
        return int(torch.linalg.matrix_rank(parts["dense"].double()))
    return sum(x.shape[1] for name, x in parts.items() if name == "a" or name.endswith(".a"))


def _residual_ranks(parts: Mapping[str, Tensor]) -> list[int]:
    ranks = {int(name.split(".")[1]): x.shape[1] for name, x in parts.items() if name.endswith(".psi")}
    return [ranks[task] for task in sorted(ranks)]
