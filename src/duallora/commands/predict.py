"""``duallora predict``: what is on images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from duallora.commands import console
from duallora.commands.number_ranges import require_range
from duallora.errors import DualLoRAError


def predict(
    model: Path,
    image: list[Path],
    *,
    top: int = 3,
    unknown_below: float | Literal["auto"] | None = None,
    explain: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
) -> None:
    """Say what is on images: class, probability, task, confidence, and how unknown they look.

    Args:
        model: folder of the saved model, or hf:OWNER/NAME
        image: image files and folders of images, which are walked
        top: how many classes are given for each image
        unknown_below: call images unknown whose familiarity (1 - unknown) is below this, from 0 to 1; auto
            takes what the held-back images of the lesson named say, which 95 % of new images lie above
        explain: write a picture for each image to DIR, with what spoke for the answer bright
        out: also write a CSV file
        json: print one JSON document
        device: where to compute
        precision: of the backbone; beside 32, an answer may depend on the other images of its batch
    """
    require_range("--top", top, 1, 1000)
    given = None if unknown_below == "auto" else unknown_below
    require_range("--unknown-below", given, 0, 1)
    if out is not None and not out.absolute().parent.is_dir():
        raise DualLoRAError(f"the folder of --out {out} does not exist; create it first.")

    from duallora.explaining.explain import METHOD
    from duallora.explaining.pictures import require_folder, write_explanations
    from duallora.learner import ContinualLearner
    from duallora.outputs import unknown_thresholds
    from duallora.predictions import as_csv, as_document
    from duallora.runtime.compute import Compute
    from duallora.storage.atomic import write_atomic

    paths = _walk(image)
    if explain is not None:
        require_folder(explain, "--explain")
    machine = Compute(device, precision=precision).start()
    learner = ContinualLearner.load(model, device=machine, exact_readouts=False)
    below = unknown_thresholds(learner.tasks) if unknown_below == "auto" else {}
    found = learner.predict(paths, top=top)
    records = [as_document(each, below.get(each.task, given)) for each in found]
    explained = [] if explain is None else write_explanations(learner, paths, explain)
    for record, each in zip(records, explained, strict=False):
        record["explanation"] = str(each.picture)
        record["task_classes"] = list(each.explanation.task_classes)
    if out is not None:
        write_atomic(out, as_csv(records))
    if json:
        console.document({"predictions": records})
        return
    console.rows(
        ["image", "class", "probability", "task", "confidence", "unknown", f"top {top}"],
        [
            [
                record["path"],
                record["class"],
                f"{record['probability']:.3f}",
                record["task"],
                f"{record['task_confidence']:.3f}",
                f"{record['unknown']:.3f}",
                ", ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in record["top"]),
            ]
            for record in records
        ],
    )
    for record in records if explain is not None else ():
        taught = ", ".join(record["task_classes"])
        console.line(f"{record['explanation']}: nearest lesson {record['task']}, which taught {taught}")
    if explain is not None:
        console.line(f"bright parts spoke for the answer, by {METHOD}")


def _walk(places: list[Path]) -> list[Path]:
    """The images named, and those in the folders named, each folder sorted."""
    from duallora.data.images import find_files, is_image_name
    from duallora.data.unreadable import left_out

    paths: list[Path] = []
    for place in places:
        if not place.is_dir():
            paths.append(place)
            continue
        files = find_files(place)
        inside = [path for path in files if is_image_name(path)]
        others = [path for path in files if not is_image_name(path)]
        if not inside:
            told = f" ({left_out(others)})" if others else ""
            raise DualLoRAError(f"the folder {place} holds no images{told}; name another one.")
        if others:
            warnings.warn(f"of {place}, {left_out(others)}", stacklevel=2)
        paths += inside
    for path in paths:
        if not path.exists():
            raise DualLoRAError(f"{path} does not exist; check the path.")
    return paths
