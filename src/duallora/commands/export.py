"""``duallora export``: a saved model in a form that needs none of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from duallora.commands import console
from duallora.commands.number_ranges import require_range
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner


def export(
    model: Path,
    *,
    format: Literal["torch-export", "onnx", "peft"] = "torch-export",
    out: Path,
    precision: Literal["32", "int8"] = "32",
    calibrate: Path | None = None,
    preprocessing: bool = False,
    error: float | None = None,
    task: str | None = None,
) -> None:
    """Write a saved model in a form that needs none of this package: torch-export, ONNX, or a LoRA for peft.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        format: torch-export, which torch.export.load reads, onnx (extra export), or peft, the sum of the
            merged updates as one LoRA for the same backbone
        out: the file to write; for peft, a new folder
        precision: of onnx: 32, or int8 for the linear layers of the backbone, which needs --calibrate
        calibrate: of onnx, a folder of images of the kind that will come; half of them calibrate int8, and
            what int8 and --preprocessing change is measured on the others
        preprocessing: of onnx: resize, crop and normalise in the graph, which takes an image as decoded
            (height, width, 3), uint8, RGB
        error: of peft, the largest relative error of a layer's update, which decides its rank; where it is
            not given, .01
        task: of peft, where the gate chooses between residual adapters, the task whose images it is for
    """
    if not out.absolute().parent.is_dir():
        raise DualLoRAError(f"the folder of --out {out} does not exist; create it first.")
    if format != "peft" and (error is not None or task is not None):
        raise DualLoRAError("--error and --task go with --format peft.")
    if format != "peft" and out.is_dir():
        raise DualLoRAError(f"--out {out} is a folder; name a file.")
    require_range("--error", error, 0, 0.99)
    small = precision == "int8" or preprocessing
    if format != "onnx" and (small or calibrate is not None):
        raise DualLoRAError("--precision int8, --calibrate and --preprocessing go with --format onnx.")
    if precision == "int8" and calibrate is None:
        raise DualLoRAError("int8 needs images to calibrate on; name a folder of them with --calibrate.")
    if calibrate is not None and not small:
        raise DualLoRAError(
            "--calibrate goes with --precision int8 or --preprocessing; add one, or leave it out."
        )
    images = [] if calibrate is None else _images(calibrate)

    from duallora.learner import ContinualLearner

    learner = ContinualLearner.load(model, device="cpu")
    if format == "peft":
        _to_peft(learner, out, 0.01 if error is None else error, task)
        return
    from duallora.export import OUTPUTS
    from duallora.export import export as write

    shape = "x".join(map(str, learner.backbone.info.input_size))
    takes = "image (height x width x 3, uint8)" if preprocessing else f"images (batch x {shape})"
    if small:
        _to_small_onnx(learner, out, images, int8=precision == "int8", preprocessing=preprocessing)
    else:
        write(learner, format, out)
    console.line(f"{out}: {takes} -> {', '.join(OUTPUTS)}; {len(learner.classes)} classes")


def _images(folder: Path) -> list[Path]:
    """The images in a folder and those below it."""
    from duallora.data.images import find_files, is_image_name

    if not folder.is_dir():
        raise DualLoRAError(f"--calibrate {folder} is no folder; name a folder of images.")
    found = [path for path in find_files(folder) if is_image_name(path)]
    if len(found) < 2:
        raise DualLoRAError(f"--calibrate {folder} holds {len(found)} images; give at least two.")
    return found


def _to_small_onnx(
    learner: ContinualLearner, out: Path, images: list[Path], *, int8: bool, preprocessing: bool
) -> None:
    from duallora.export.small import small_onnx
    from duallora.storage.atomic import write_atomic

    data, told = small_onnx(learner, images, int8=int8, preprocessing=preprocessing)
    write_atomic(out, data)
    made_up = "" if images else " (made up; give real ones with --calibrate)"
    for each in told:
        (before, after), (large, small) = each.milliseconds, each.megabytes
        console.line(f"{each.name}: {each.parity}{made_up}")
        console.line(f"  {before:.1f} -> {after:.1f} ms an image on one core, {large:.1f} -> {small:.1f} MB")


def _to_peft(learner: ContinualLearner, out: Path, error: float, task: str | None) -> None:
    from duallora.export.peft import to_peft

    done = to_peft(learner, out, error, task)
    ranks = sorted(done.ranks.values())
    console.line(
        f"{out}: a LoRA of rank {ranks[0]} to {ranks[-1]} at {len(ranks)} projections, for {done.base}"
    )
    console.line(f"largest relative error of a layer's update: {done.error:.1e}")
    console.line(f"residual adapters: {done.gate}")
    console.line("it gives the features of the adapted backbone; heads and class statistics are not in it")
