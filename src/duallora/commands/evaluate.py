"""``duallora evaluate``: how right a saved model is on labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from duallora.commands import console
from duallora.errors import DualLoRAError


def evaluate(
    model: Path,
    folder: Path,
    *,
    json: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
) -> None:
    """Measure accuracy per task and over all, confusion between tasks and calibration on labelled images.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        folder: labelled images in FOLDER/<class>/, or below val/ or test/ where there is one
        json: print one JSON document
        device: where to compute
        precision: of the backbone; beside 32, an answer may depend on the other images of its batch
    """
    from duallora.learner import ContinualLearner
    from duallora.runtime.compute import Compute
    from duallora.storage.documents import percent
    from duallora.streams import FolderDataset, evaluation_folder

    machine = Compute(device, precision=precision).start()
    learner = ContinualLearner.load(model, device=machine, exact_readouts=False)
    dataset = FolderDataset(evaluation_folder(folder))
    try:
        found = learner.evaluate(dataset)
    except DualLoRAError:
        dataset.check()  # says how many files are bad, where one is; else every image is decoded once
        raise
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
