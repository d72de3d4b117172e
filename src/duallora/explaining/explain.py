"""Which parts of an image speak for its answer, as a picture and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from duallora.backbones.compiling import uncompiled
from duallora.data.images import to_pil
from duallora.data.transforms import ImageLike
from duallora.errors import DualLoRAError
from duallora.explaining.attention import AttentionWeights, relevance
from duallora.explaining.overlay import overlay
from duallora.outputs import rows_of
from duallora.predictions import log_rows, summed_classes, summed_tasks

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone
    from duallora.learner import ContinualLearner

_HOTTEST = 0.95  # share of the patches below the heat 1

METHOD = "gradient-weighted attention (Chefer, Gur and Wolf 2021, arXiv 2103.15679)"


@dataclass(frozen=True)
class Explanation:
    """What spoke for a class on one image.

    Attributes:
        label: the class that is explained.
        probability: of that class.
        task: the lesson that the image is nearest to.
        task_confidence: its probability.
        task_classes: the classes that this lesson taught.
        heat: (rows, columns) of patches, in [0, 1]: 1 at the twentieth that speaks most for the class, 0
            where least does.
        overlay: the part of the image that the model sees, with the heat drawn over it.
    """

    label: str
    probability: float
    task: str
    task_confidence: float
    task_classes: tuple[str, ...]
    heat: Tensor
    overlay: Image.Image

    @property
    def text(self) -> str:
        """The picture in two sentences."""
        taught = ", ".join(self.task_classes[:8]) + (", ..." if len(self.task_classes) > 8 else "")
        return (
            f"Bright parts spoke most for {self.label!r} ({self.probability:.0%}) over all other classes, by "
            f"{METHOD}. The nearest lesson is {self.task!r} ({self.task_confidence:.0%}); it taught {taught}."
        )


def explain(learner: ContinualLearner, image: ImageLike, label: str | None = None) -> Explanation:
    """Shows which parts of an image speak for a class, by gradient-weighted attention.

    The score behind it is the log odds of the class against all others, so that a sure answer has a gradient
    too. One pass with gradients is made for the image, and nothing of the learner changes; other
    threads may use it meanwhile. A heat map shows where the model looked, and proves no cause.

    Args:
        learner: has learned two classes or more.
        image: PIL image, path, or tensor as for ``predict``.
        label: the class to explain; None takes the answer.

    Raises:
        DualLoRAError: the image cannot be read, the class is unknown, or there is no other class.
    """
    if not learner.tasks:
        learner.outputs_of([])  # says so
    if len(learner.classes) < 2:
        raise DualLoRAError(
            "the model knows a single class, so nothing speaks for it over others; teach it another class."
        )
    if label is not None and label not in learner.classes:
        raise DualLoRAError(f"the model has not learned {label!r}; name one of its classes, or leave it out.")
    picture = to_pil(image)
    batch = learner.preprocess(picture)[None].to(learner.device).requires_grad_()
    with uncompiled(), torch.enable_grad(), AttentionWeights() as seen:
        with learner.method.context.reading(), learner.method.computing.holding(True):
            encoding = learner.method.encode(batch)
        found = learner.method.readouts(encoding)
    row_task, row_class = (rows.to(learner.device) for rows in rows_of(learner.tasks, learner.classes))
    readout, rows = learner.method.answer, log_rows(found, learner.method.answer)
    probabilities = summed_classes(rows.detach().double(), row_class, len(learner.classes))[0]
    number = int(probabilities.argmax()) if label is None else learner.classes.index(label)
    mine = row_class == number
    score = rows[0, mine].logsumexp(0) - rows[0, ~mine].logsumexp(0)
    tokens = relevance(seen.maps, score, learner.backbone.depth, learner.backbone.has_class_token)
    heat = _heat(tokens, learner.backbone)
    confidence, task = summed_tasks(found, readout, row_task, len(learner.tasks)).detach()[0].max(0)
    record = learner.tasks[int(task)]
    return Explanation(
        label=learner.classes[number],
        probability=float(probabilities[number]),
        task=record.name,
        task_confidence=float(confidence),
        task_classes=record.classes,
        heat=heat,
        overlay=overlay(picture.crop(_whole(learner.preprocess.seen(*picture.size))), heat),
    )


def _heat(tokens: Tensor, backbone: Backbone) -> Tensor:
    """Relevance of the patches (rows, columns), from 0 to 1, from that of all tokens (N,)."""
    rows, columns = backbone.grid
    patches = tokens[backbone.num_prefix_tokens :][: rows * columns].reshape(rows, columns)
    # One patch is often far above all others; what the next ones say would be lost beside it.
    span = patches.quantile(_HOTTEST) - patches.min()
    return ((patches - patches.min()) / span).clamp(max=1) if span > 0 else torch.zeros_like(patches)


def _whole(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """A box in whole pixels, at least one."""
    left, upper, right, lower = map(round, box)
    return left, upper, max(right, left + 1), max(lower, upper + 1)
