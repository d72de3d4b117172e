"""``duallora evaluate``: how right a saved model is on labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from duallora.commands import console


def evaluate(
    model: Path,
    folder: Path,
    *,
    json: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Measure accuracy per task and over all, confusion between tasks and calibration on labelled images.

    Args:
        model: folder of the saved model
        folder: labelled images in FOLDER/<class>/, or below val/ or test/ where there is one
        json: print one JSON document
        device: where to compute
    """
    from duallora.learner import ContinualLearner
    from duallora.storage.documents import percent
    from duallora.streams import FolderDataset, evaluation_folder

    learner = ContinualLearner.load(model, device=device)
    dataset = FolderDataset(evaluation_folder(folder))
    dataset.check()
    found = learner.evaluate(dataset)
    tasks = [dataclasses.asdict(task) for task in found.tasks]
    if json:
        console.document(
            {
                "accuracy": found.accuracy,
                "tasks": tasks,
                "task_confusion": found.task_confusion,
                "calibration_error": found.calibration_error,
            }
        )
        return
    console.line(f"accuracy {percent(found.accuracy)} % on {found.images} images")
    error = "-" if found.calibration_error is None else f"{found.calibration_error:.3f}"
    console.line(f"calibration error {error}")
    names = [str(number) for number in range(1, len(tasks) + 1)]
    console.rows(
        ["", "task", "images", "accuracy %", *(f"as {name}" for name in names)],
        [
            [
                name,
                task["name"],
                str(task["images"]),
                percent(task["accuracy"]),
                *(str(count) for count in counts),
            ]
            for name, task, counts in zip(names, tasks, found.task_confusion, strict=True)
        ],
    )
