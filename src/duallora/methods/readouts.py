"""What a method says of a batch of images, from one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from duallora.classifiers.calibration import calibrate
from duallora.methods.interface import BatchOutputs

if TYPE_CHECKING:
    from duallora.methods.base import Method


def readouts(method: Method, images: Tensor, *, cached: bool) -> BatchOutputs:
    """Readouts of a batch, with gradients to the images where those are asked for.

    Args:
        method: answers.
        images: (B, 3, H, W).
        cached: features of the bare backbone may come from the cache; else all of it is computed.
    """
    config, rows = method.config, method.rows
    with method.context.reading(), method.computing.holding(not cached):
        encoding = method.encode(images)
    logits = method.head_logits(encoding)
    log_q, familiarity = rows.posterior_and_familiarity(encoding.features)
    log_task = method.task_posterior(encoding, log_q)
    calibrated = None
    if config.calibration != "none":
        calibrated = calibrate(logits, log_q, log_task, rows.row_task, config.calibration, config.tau)
    if method.realigned:  # they began under the covariance of their time, which later tasks change
        logits = log_q + (logits - method.starts(encoding.features)) / 2
    return BatchOutputs(
        logits.log_softmax(1),
        calibrated,
        log_task,
        familiarity,
        encoding.gate,
        method.final(encoding.features),
    )
