"""``duallora export``: a saved model as one file that needs none of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from duallora.commands import console
from duallora.errors import DualLoRAError


def export(model: Path, *, format: Literal["torch-export", "onnx"] = "torch-export", out: Path) -> None:
    """Write a saved model as one file that predicts without this package: torch-export or ONNX.

    Args:
        model: folder of the saved model
        format: torch-export, which torch.export.load reads, or onnx (extra export)
        out: the file to write
    """
    if not out.absolute().parent.is_dir():
        raise DualLoRAError(f"the folder of --out {out} does not exist; create it first.")
    if out.is_dir():
        raise DualLoRAError(f"--out {out} is a folder; name a file.")

    from duallora.export import OUTPUTS
    from duallora.export import export as write
    from duallora.learner import ContinualLearner

    learner = ContinualLearner.load(model, device="cpu")
    write(learner, format, out)
    shape = "x".join(map(str, learner.backbone.info.input_size))
    console.line(f"{out}: images (batch x {shape}) -> {', '.join(OUTPUTS)}; {len(learner.classes)} classes")
