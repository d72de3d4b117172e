"""What a model says of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duallora.predictions import as_document, predictions, task_probabilities

if TYPE_CHECKING:
    from duallora.serving.model_watch import ServedModel


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
        record: as ``duallora predict --json`` gives it.
        weights: task and weight, of those that are not forgotten, in the order in which they were learned.
        gated: whether these are the weights of residual adapters; else how probable each task is.
    """

    record: dict[str, Any]
    weights: tuple[tuple[str, float], ...]
    gated: bool


def answers(
    model: ServedModel,
    images: Sequence[Tensor],
    names: Sequence[str],
    top: int = 3,
    unknown_below: float | None = None,
) -> list[Answer]:
    """What a model says of some images.

    Args:
        model: asked.
        images: as its ``preprocess`` gives them, (3, H, W); one batch.
        names: as they are shown.
        top: how many classes an answer has.
        unknown_below: answers of a lower familiarity are unknown; None for none.
    """
    learner = model.learner
    outputs = learner.outputs_of([torch.stack(list(images))])
    lessons = [task.name for task in learner.tasks]
    said = predictions(outputs, learner.classes, lessons, list(names), top)
    gated = outputs.gate is not None
    weights = outputs.gate if outputs.gate is not None else task_probabilities(outputs, len(lessons))
    there = [t for t, task in enumerate(learner.tasks) if not task.forgotten]
    return [
        Answer(as_document(p, unknown_below), tuple((lessons[t], float(row[t])) for t in there), gated)
        for p, row in zip(said, weights, strict=True)
    ]
