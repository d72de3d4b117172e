"""``duallora evaluate``: how right a saved model is on labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.number_ranges import require_range
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.outputs import Mistake


def evaluate(
    model: Path,
    folder: Path,
    *,
    worst: int = 0,
    worst_out: Path | None = None,
    json: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
) -> None:
    """Measure accuracy per task and over all, confusion between tasks and calibration on labelled images.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        folder: labelled images in FOLDER/<class>/, or below val/ or test/ where there is one
        worst: also list so many images whose wrong answer was the surest
        worst_out: write these to DIR, as worst.csv and as a sheet of small pictures, worst.png
        json: print one JSON document
        device: where to compute
        precision: of the backbone; beside 32, an answer may depend on the other images of its batch
    """
    require_range("--worst", worst, 0, 10_000)
    if worst_out is not None and not worst:
        raise DualLoRAError("--worst-out needs to know how many images: give --worst N too.")

    from duallora.explaining.pictures import require_folder
    from duallora.explaining.worst import write_worst
    from duallora.learner import ContinualLearner
    from duallora.runtime.compute import Compute
    from duallora.storage.documents import percent
    from duallora.streams import FolderDataset, evaluation_folder
    from duallora.streams.labels import refuse_two_labels

    if worst_out is not None:
        require_folder(worst_out, "--worst-out")
    machine = Compute(device, precision=precision).start()
    learner = ContinualLearner.load(model, device=machine, exact_readouts=False)
    dataset = FolderDataset(evaluation_folder(folder))
    refuse_two_labels(dataset.labelled)
    try:
        found = learner.evaluate(dataset)
    except DualLoRAError:
        dataset.check()  # says how many files are bad, where one is; else every image is decoded once
        raise
    tasks = [dataclasses.asdict(task) for task in found.tasks]
    mistakes = [(str(dataset.paths[each.index]), each) for each in found.mistakes[:worst]]
    if worst_out is not None and mistakes:
        write_worst([each for _, each in mistakes], dataset.paths, worst_out)
    if json:
        console.document(
            {
                "accuracy": found.accuracy,
                "tasks": tasks,
                "task_confusion": found.task_confusion,
                "calibration_error": found.calibration_error,
                **({"worst": [_as_document(path, each) for path, each in mistakes]} if worst else {}),
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
    if worst:
        _tell_worst(mistakes, worst_out)


def _tell_worst(mistakes: list[tuple[str, Mistake]], out: Path | None) -> None:
    """The surest mistakes."""
    if not mistakes:
        console.line("no answer is wrong")
        return
    console.line("most surely wrong:")
    console.rows(
        ["image", "true class", "answer", "probability", "of the true class"],
        [
            [path, each.true, each.answer, f"{each.probability:.3f}", f"{each.probability_of_true:.3f}"]
            for path, each in mistakes
        ],
    )
    if out is not None:
        console.line(f"{out / 'worst.csv'} and {out / 'worst.png'} show them")


def _as_document(path: str, mistake: Mistake) -> dict[str, Any]:
    return {
        "path": path,
        "true": mistake.true,
        "answer": mistake.answer,
        "probability": mistake.probability,
        "probability_of_true": mistake.probability_of_true,
    }
