"""From raw outputs to predictions: what a learner says of each image, and how that is written as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from duallora import metrics
from duallora.classifiers.class_statistics import sum_rows
from duallora.outputs import Outputs, Prediction

UNKNOWN = "unknown"


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
    probabilities = metrics.class_probabilities(outputs, outputs.readout)
    values, which = probabilities.topk(min(max(top, 1), len(classes)), 1)
    confidence, task = task_probabilities(outputs, len(tasks)).max(1)
    found = []
    for i, path in enumerate(paths):
        best = tuple(
            (classes[c], float(p)) for c, p in zip(which[i].tolist(), values[i].tolist(), strict=True)
        )
        found.append(
            Prediction(
                path=path,
                label=best[0][0],
                probability=best[0][1],
                task=tasks[int(task[i])],
                task_confidence=float(confidence[i]),
                unknown=1.0 - float(outputs.familiarity[i]),
                top=best,
            )
        )
    return found


def task_probabilities(outputs: Outputs, tasks: int) -> Tensor:
    """Which of so many tasks each image belongs to (n, tasks), by the method's own readout."""
    # Where plain heads answer, the task is theirs too: the rows might contradict the class.
    by_heads = outputs.readout == "heads"
    log_task = sum_rows(outputs.heads, outputs.row_task, tasks) if by_heads else outputs.task_posterior
    return log_task.exp().clamp(max=1.0)


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
