"""What an ONNX file answers beside what it was made from, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duallora.errors import DualLoRAError

Values = np.ndarray[Any, Any]

_TIMED = 15  # images, one at a time; the median of them is told


@dataclass(frozen=True)
class Parity:
    """Two sets of answers to the same images.

    Attributes:
        images: how many.
        same_label: share of them with the same most probable class.
        largest: largest difference of a class probability.
    """

    images: int
    same_label: float
    largest: float

    @classmethod
    def of(cls, found: Values, wanted: Values) -> Parity:
        """From probabilities (n, classes) of one and of the other."""
        same = found.argmax(1) == wanted.argmax(1)
        return cls(len(found), float(same.mean()), float(np.abs(found - wanted).max()))

    def __str__(self) -> str:
        return (
            f"the same class on {100 * self.same_label:.1f} % of {self.images} images, "
            f"largest difference of a probability {self.largest:.1e}"
        )


def answers(data: bytes, images: Sequence[Values]) -> tuple[Values, float]:
    """What an ONNX file says of images, asked one at a time on one core of this processor.

    Args:
        data: of the file.
        images: each as the file's input takes it, without a dimension for the batch that it may have.

    Returns:
        Class probabilities (n, classes), and the median of the milliseconds of an image.

    Raises:
        DualLoRAError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DualLoRAError("this needs more packages: pip install 'duallora[export]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (asked,) = session.get_inputs()
    batched = len(asked.shape) == 4
    found, seconds = [], []
    for image in images:
        start = time.perf_counter()
        (probabilities,) = session.run(["probabilities"], {asked.name: image[None] if batched else image})
        seconds.append(time.perf_counter() - start)
        found.append(probabilities[0])
    # The first call also lays out memory.
    return np.stack(found), 1000 * statistics.median(seconds[1 : _TIMED + 1] or seconds)
