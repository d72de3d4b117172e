"""A learner as one file that needs none of this package: backbone, adapters, gate, heads and calibration.

The file takes preprocessed images and gives what ``predict`` says; how images are preprocessed and what the
classes are called stands in its metadata.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from duallora.errors import DualLoRAError
from duallora.learner import ContinualLearner
from duallora.predictions import log_rows, summed_classes, summed_tasks
from duallora.storage.atomic import write_atomic

Format = Literal["torch-export", "onnx"]

METADATA = "duallora.json"
"""Under which name a torch-export file holds its metadata; in an ONNX file it is ``duallora``."""

OUTPUTS = ("probabilities", "task_probabilities", "familiarity")
_EXAMPLE = 2  # images; one would be taken for a constant


class Exported(nn.Module):
    """Images (B, 3, H, W) -> class probabilities (B, C), task probabilities (B, T), familiarity (B,).

    Args:
        learner: with at least one task; it is left as it is.

    Raises:
        DualLoRAError: nothing has been learned.
    """

    def __init__(self, learner: ContinualLearner) -> None:
        super().__init__()
        if not learner.tasks:
            raise DualLoRAError("this model has learned nothing yet; teach it a task first.")
        self.backbone = learner.backbone
        self._method = (learner.method,)  # no module, and not to be saved as one
        rows = [learner.classes.index(name) for task in learner.tasks for name in task.classes]
        self.classes, self.tasks = len(learner.classes), len(learner.tasks)
        self.row_class: Tensor
        self.register_buffer("row_class", torch.tensor(rows, device=learner.device), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class; the sums of ``predict``, in fp32."""
        (method,) = self._method
        readout = method.logits(images)
        rows = log_rows(readout, method.answer)
        return (
            summed_classes(rows, self.row_class, self.classes),
            summed_tasks(readout, method.answer, method.rows.row_task, self.tasks),
            readout.familiarity,
        )


def export(learner: ContinualLearner, form: Format, file: Path) -> None:
    """Writes a learner as one file, whole or not at all.

    Args:
        learner: on the CPU.
        form: ``torch-export`` for ``torch.export.load``, or ``onnx``.
        file: where to.

    Raises:
        DualLoRAError: an unknown format, nothing learned, a model that cannot be traced, or onnx is missing.
    """
    if form not in get_args(Format):
        raise DualLoRAError(f"unknown format {form!r}; take {' or '.join(get_args(Format))}.")
    about = metadata(learner)
    write_atomic(file, to_onnx(learner, about) if form == "onnx" else to_torch(learner, about))


def metadata(learner: ContinualLearner) -> dict[str, Any]:
    """What a reader of the file has to know: preprocessing, names of classes and tasks, what comes out."""
    info = learner.backbone.info
    views = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    return {
        "format": 1,
        "method": learner.method_name,
        "backbone": info.name,
        "backbone_sha256": info.sha256,
        "classes": list(learner.classes),
        "tasks": [task.name for task in learner.tasks],
        "calibration": learner.config.calibration,
        "readout": learner.method.answer,
        "preprocessing": {view: info.to_dict()[view] for view in views},
        "input": "images: float32 (batch, channels, height, width), RGB in [0, 1], then (x - mean) / std",
        "outputs": {
            "probabilities": "(batch, classes)",
            "task_probabilities": "(batch, tasks)",
            "familiarity": "(batch,): 1 - unknown",
        },
    }


def to_torch(learner: ContinualLearner, about: dict[str, Any]) -> bytes:
    """The bytes of a file for ``torch.export.load``; the metadata is its extra file `METADATA`."""
    data = io.BytesIO()
    torch.export.save(traced(learner), data, extra_files={METADATA: json.dumps(about)})
    return data.getvalue()


def to_onnx(learner: ContinualLearner, about: dict[str, Any]) -> bytes:
    """The bytes of an ONNX file; the metadata stands under ``duallora`` in its ``metadata_props``.

    Raises:
        DualLoRAError: onnx is not installed, or an operation has no counterpart in ONNX.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs both
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DualLoRAError("ONNX files need more packages: pip install 'duallora[export]'.") from error
    program = traced(learner)
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=list(OUTPUTS)
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise DualLoRAError(
            f"{learner.method_name} computes what ONNX does not have; take --format torch-export."
        ) from error
    model: Any = made.model_proto
    for key, value in (("duallora", json.dumps(about)), ("classes", json.dumps(about["classes"]))):
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    return data


def traced(learner: ContinualLearner) -> torch.export.ExportedProgram:
    """The learner as a graph whose batch size is free.

    Raises:
        DualLoRAError: a method or a backbone that torch.export cannot follow.
    """
    model = Exported(learner).eval()
    example = torch.zeros(_EXAMPLE, *learner.backbone.info.input_size, device=learner.device)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        with torch.no_grad(), _quiet(), torch.compiler.set_stance("force_eager"):
            program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: batch}})
    except Exception as error:  # torch.export raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DualLoRAError(
            f"{learner.method_name} on {learner.backbone.info.name} cannot be exported: {reason}"
        ) from error
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own remarks are for who writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
