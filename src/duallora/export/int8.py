"""An ONNX file whose linear layers compute in whole numbers of eight bits, and what that changes.

onnxruntime's static quantiser finds the range of what enters each layer from images. Quantised are the linear
layers of the backbone, which hold nearly all of its weights and time. Its convolutions, attention's products
of tokens, the gate, heads and class statistics stay in fp32: they are small, and a distance to a class mean
does not forgive eight bits.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from duallora.errors import DualLoRAError

BATCH = 16
_BACKBONE = "/backbone: "  # in the scope of a node that the exporter writes
_LINEAR = "aten.linear"


def quantised(data: bytes, images: Sequence[np.ndarray[Any, Any]]) -> bytes:
    """The same graph with its linear layers in int8.

    Weights are symmetric by output channel and use seven bits: without the instructions of newer processors
    (VNNI) two products of eight bits add up to more than sixteen hold, and the answers would depend on the
    processor.

    Args:
        data: an ONNX file as :func:`duallora.export.to_onnx` gives it.
        images: preprocessed ones (3, height, width) to calibrate on, the more like those to come the better.

    Raises:
        DualLoRAError: onnxruntime is not installed, or the backbone has no such layer.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise DualLoRAError("int8 needs more packages: pip install 'duallora[export]'.") from error
    names = linear_layers(onnx.load_model_from_string(data))
    if not names:
        raise DualLoRAError(
            "this backbone has no linear layer that could be quantised; leave --precision out."
        )
    with tempfile.TemporaryDirectory(prefix="duallora-int8-") as folder, _quiet():
        before, after = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(data)
        quantization.quantize_static(
            before,
            after,
            _Reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=names,
        )
        return after.read_bytes()


def linear_layers(model: Any) -> list[str]:
    """Names of the nodes that are linear layers of the backbone, its merged projections among them.

    Args:
        model: ``onnx.ModelProto`` of torch's exporter.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        scope = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
        linear = node.op_type in ("MatMul", "Gemm") and _LINEAR in scope.rsplit("/", 1)[-1]
        if linear and _BACKBONE in scope and any(name in constants for name in node.input):
            found.append(node.name)
    return found


class _Reader:
    """Hands images out in batches, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Sequence[np.ndarray[Any, Any]]) -> None:
        starts = range(0, len(images), BATCH)
        self._batches: Iterator[Any] = (np.stack(images[start : start + BATCH]) for start in starts)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch under the input's name, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs advice to the root logger that is for who writes graphs by hand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
