"""Generations of a saved model, by their number."""

from __future__ import annotations

from pathlib import Path

import torch

from duallora.storage import checkpoint


def weights(generation: int) -> dict[str, torch.Tensor]:
    return {
        "dW": torch.full((3, 4), float(generation)),
        "rows": torch.arange(6, dtype=torch.float64).reshape(2, 3).T + generation,
        "counts": torch.tensor([generation], dtype=torch.int64),
        "nothing": torch.zeros(0, 5, dtype=torch.bfloat16),
    }


def save(folder: Path, generation: int, backbone: Path | None = None) -> None:
    extra = {}
    if backbone is not None:
        digest = checkpoint.sha256_of(backbone) if backbone.exists() else "0" * 64
        extra = {"backbone": (backbone, digest)}
    with checkpoint.exclusive(folder):
        checkpoint.commit(
            folder,
            {"generation": generation, "classes": ["ä/b", "c"]},
            weights(generation),
            extra_files=extra,
        )


def generation_of(folder: Path) -> int:
    """The generation in the folder, after checking that it is complete."""
    manifest, tensors = checkpoint.read(folder)
    generation: int = manifest["generation"]
    for name, expected in weights(generation).items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name
    return generation


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_clean(folder: Path) -> None:
    """Only what the current and the previous generation name is there."""
    manifest = checkpoint.read_manifest(folder)
    named = set(manifest["files"]) | set((manifest["previous"] or {"files": {}})["files"])
    assert names(folder) == named | {"model.json", ".lock"}
