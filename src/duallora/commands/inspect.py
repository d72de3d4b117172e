"""``duallora inspect``: what a saved model holds."""

from __future__ import annotations

from pathlib import Path

from duallora.commands import console


def inspect(model: Path, *, json: bool = False) -> None:
    """Show what a saved model holds: tasks, classes, dates, ranks and bases per layer, bytes per part.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        json: print one JSON document
    """
    from duallora.methods.saved_state import description
    from duallora.sharing.local import local_folder
    from duallora.storage import checkpoint
    from duallora.storage.soundness import check

    model = local_folder(model)
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
