"""What the answer for a batch of images is, and how predictions are written as JSON and CSV.

The rule stands here once, for ``predict``, ``evaluate``, the figures of a run and exported files. The
probability of a class is the sum over its rows, and never above 1. The class of an image is the most probable
one, and among equals the first. The task of an image is the most probable one too: the one with the largest
summed posterior, or with the largest sum of the heads where plain heads answer. It is not the task of the
best row, because several rows of one task may together be more probable than a single row of another, and
``task_confidence`` is the probability of the task that is named.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duallora.classifiers.log_probabilities import sum_rows
from duallora.outputs import Evaluation, Mistake, Outputs, Prediction, TaskAccuracy

if TYPE_CHECKING:
    from duallora.methods import BatchOutputs

CALIBRATION_BINS = 15
READOUTS = ("heads", "calibrated")
UNKNOWN = "unknown"


def log_rows(logs: Outputs | BatchOutputs, readout: str) -> Tensor:
    """Log-probabilities of the rows under a readout, (n, R).

    Raises:
        ValueError: If the readout is unknown or the method does not have it.
    """
    if readout not in READOUTS:
        raise ValueError(f"unknown readout {readout!r}, expected one of {READOUTS}")
    scores = logs.heads if readout == "heads" else logs.calibrated
    if scores is None:
        raise ValueError("this method has no calibrated probabilities")
    return scores


def readouts_of(logs: Outputs | BatchOutputs) -> tuple[str, ...]:
    """The readouts that the method behind these logs has."""
    return READOUTS if logs.calibrated is not None else READOUTS[:1]


def summed_classes(log_probabilities: Tensor, row_class: Tensor, classes: int) -> Tensor:
    """Probability of every class, the sum over its rows: (n, classes), in [0, 1].

    Args:
        log_probabilities: of the rows (n, R); the sums have their precision.
        row_class: class of each row (R,).
        classes: how many there are.
    """
    rows = log_probabilities.exp()
    summed = rows.new_zeros(rows.shape[0], classes).scatter_add(1, row_class.expand_as(rows), rows)
    return summed.clamp(max=1.0)  # the logs are rounded, and so a sum may be above 1


def summed_tasks(logs: Outputs | BatchOutputs, readout: str, row_task: Tensor, tasks: int) -> Tensor:
    """Probability of every task (n, tasks), in [0, 1].

    Args:
        logs: of the images.
        readout: the readout that answers.
        row_task: task of each row (R,).
        tasks: how many there are.
    """
    # Where plain heads answer, the task is theirs too: the posterior might contradict the class.
    by_heads = readout == "heads"
    log_tasks = sum_rows(logs.heads, row_task, tasks) if by_heads else logs.task_posterior
    return log_tasks.exp().clamp(max=1.0)


def class_probabilities(outputs: Outputs, readout: str | None = None) -> Tensor:
    """Probability of every class seen so far: (n, C), float64, column = class index.

    Args:
        outputs: of the images.
        readout: ``"heads"`` or ``"calibrated"``; the default is the method's own.
    """
    rows = log_rows(outputs, outputs.readout if readout is None else readout)
    return summed_classes(rows.double(), outputs.row_class, int(outputs.row_class.max()) + 1)


def task_probabilities(outputs: Outputs, tasks: int) -> Tensor:
    """Probability of each of so many tasks (n, tasks), by the method's own readout."""
    return summed_tasks(outputs, outputs.readout, outputs.row_task, tasks)


def best(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each image and its column, both (n,): among equals the first."""
    values, columns = probabilities.max(dim=1)
    return values, columns


def ranked(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each image and their columns, both (n, count), in the order of `best`."""
    values, columns = probabilities.sort(dim=1, descending=True, stable=True)
    return values[:, :count], columns[:, :count]


def calibration_error(confidence: Tensor, correct: Tensor) -> float | None:
    """Expected calibration error on the top class, ``sum_b n_b/n |accuracy_b - confidence_b|`` over 15 bins.

    Args:
        confidence: (n,) probability of the predicted class.
        correct: (n,) whether the predicted class is right.

    Returns:
        The error in [0, 1]; None where it is undefined (no image, or a probability that is not finite).
    """
    if len(confidence) == 0 or not bool(torch.isfinite(confidence).all()):
        return None
    # Here, because importing it takes seconds that a prediction does not need.
    from torchmetrics.functional.classification import binary_calibration_error

    # torchmetrics gives a probability of exactly 1 a sixteenth bin of its own, and takes values beyond 1
    # (rounding) for logits: both are avoided by staying just below 1.
    confidence = confidence.double().clamp(0.0, 1.0 - torch.finfo(torch.float64).eps)
    error = binary_calibration_error(confidence, correct.long(), n_bins=CALIBRATION_BINS, norm="l1")
    return float(error)


def predictions(
    outputs: Outputs, classes: Sequence[str], tasks: Sequence[str], paths: Sequence[str | None], top: int
) -> list[Prediction]:
    """What is on each of n images.

    Args:
        outputs: of the images.
        classes: names of all classes, in the order of ``outputs.row_class``.
        tasks: names of all tasks, in their order.
        paths: files of the images (n,), None for those that came from no file.
        top: how many classes are given for each.
    """
    values, which = ranked(class_probabilities(outputs), max(top, 1))
    confidence, task = best(task_probabilities(outputs, len(tasks)))
    found = []
    for i, path in enumerate(paths):
        first = tuple(
            (classes[c], float(p)) for c, p in zip(which[i].tolist(), values[i].tolist(), strict=True)
        )
        found.append(
            Prediction(
                path=path,
                label=first[0][0],
                probability=first[0][1],
                task=tasks[int(task[i])],
                task_confidence=float(confidence[i]),
                unknown=1.0 - float(outputs.familiarity[i]),
                top=first,
            )
        )
    return found


def evaluation(
    outputs: Outputs, labels: Tensor, true_task: Tensor, classes: Sequence[str], tasks: Sequence[str]
) -> Evaluation:
    """How right the answers for n images are.

    Args:
        outputs: of the images.
        labels: (n,) true class indices, as in ``outputs.row_class``.
        true_task: (n,) task of the true class.
        classes: names of all classes, in the order of ``outputs.row_class``.
        tasks: names of all tasks, in their order.
    """
    probabilities = class_probabilities(outputs)
    confidence, found = best(probabilities)
    _, found_task = best(task_probabilities(outputs, len(tasks)))
    right, count = found == labels, len(tasks)
    confusion = torch.bincount(true_task * count + found_task, minlength=count**2).reshape(count, count)
    accuracies = []
    for t, name in enumerate(tasks):
        mine = right[true_task == t]
        accuracies.append(TaskAccuracy(name, int(mine.sum()) / len(mine) if len(mine) else None, len(mine)))
    return Evaluation(
        accuracy=int(right.sum()) / len(right),
        tasks=tuple(accuracies),
        task_confusion=tuple(tuple(row) for row in confusion.tolist()),
        calibration_error=calibration_error(confidence, right),
        images=len(right),
        mistakes=_mistakes(probabilities, found, labels, classes),
    )


def _mistakes(
    probabilities: Tensor, found: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[Mistake, ...]:
    """The wrong answers for n images, the surest first, among equals in the order of the images."""
    wrong = [
        Mistake(i, names[int(true)], names[int(c)], float(p[c]), float(p[true]))
        for i, (p, c, true) in enumerate(zip(probabilities, found, labels, strict=True))
        if c != true
    ]
    return tuple(sorted(wrong, key=lambda each: -each.probability))


def as_document(prediction: Prediction, unknown_below: float | None = None) -> dict[str, Any]:
    """A prediction as JSON holds it.

    Args:
        prediction: what the learner says.
        unknown_below: the class of an image with a familiarity (1 - unknown) below this is ``unknown``;
            ``called_unknown`` tells it from a class of that name.
    """
    unknown = unknown_below is not None and 1 - prediction.unknown < unknown_below
    return {
        "path": prediction.path,
        "class": UNKNOWN if unknown else prediction.label,
        "probability": prediction.probability,
        "task": prediction.task,
        "task_confidence": prediction.task_confidence,
        "unknown": prediction.unknown,
        "called_unknown": unknown,
        "top": [{"class": name, "probability": probability} for name, probability in prediction.top],
    }


def as_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Predictions as :func:`as_document` gives them, one line an image; the top classes in own columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ["path", "class", "probability", "task", "task_confidence", "unknown", "called_unknown"]
    places = range(1, max(len(record["top"]) for record in records) + 1)
    writer.writerow([*fields, *(f"{what}_{place}" for place in places for what in ("class", "probability"))])
    for record in records:
        best = [value for entry in record["top"] for value in (entry["class"], entry["probability"])]
        writer.writerow([*(_cell(record[field]) for field in fields), *best])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value  # as JSON writes it
