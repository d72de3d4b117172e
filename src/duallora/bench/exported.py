"""An exported file as a candidate: what it takes to predict with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.export import metadata, to_onnx, to_torch
from duallora.learner import ContinualLearner


def runner(learner: ContinualLearner, form: str) -> Callable[[Tensor], Any]:
    """Exports a learner in memory and gives the call that predicts with what came out.

    Args:
        learner: on the CPU, fp32.
        form: ``torch-export`` or ``onnx``; the latter runs in onnxruntime with torch's number of threads.

    Raises:
        DualLoRAError: another device, or onnxruntime is not installed.
    """
    if learner.device.type != "cpu":
        raise DualLoRAError(
            "exported files are measured on the CPU; leave --exports out, or take --device cpu."
        )
    about = metadata(learner)
    if form == "torch-export":
        program: Any = torch.export.load(io.BytesIO(to_torch(learner, about))).module()

        @torch.no_grad()
        def run(images: Tensor) -> Any:
            return program(images)

        return run
    try:
        import onnxruntime
    except ImportError as error:
        raise DualLoRAError("ONNX files need more packages: pip install 'duallora[export]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise go on turning while the next candidate is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        to_onnx(learner, about), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images.numpy()})
