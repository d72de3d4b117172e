"""``duallora predict``: what is on images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.ranges import require_range
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.outputs import Prediction

UNKNOWN = "unknown"


def predict(
    model: Path,
    image: list[Path],
    *,
    top: int = 3,
    unknown_below: float | None = None,
    out: Path | None = None,
    json: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Say what is on images: class, probability, task, confidence, and how unknown they look.

    Args:
        model: folder of the saved model
        image: image files and folders of images, which are walked
        top: how many classes are given for each image
        unknown_below: call images unknown whose familiarity (1 - unknown) is below this, from 0 to 1
        out: also write a CSV file
        json: print one JSON document
        device: where to compute
    """
    require_range("--top", top, 1, 1000)
    require_range("--unknown-below", unknown_below, 0, 1)
    if out is not None and not out.absolute().parent.is_dir():
        raise DualLoRAError(f"the folder of --out {out} does not exist; create it first.")

    from duallora.atomic import write_atomic
    from duallora.learner import ContinualLearner

    paths = _walk(image)
    found = ContinualLearner.load(model, device=device).predict(paths, top=top)
    records = [_record(prediction, unknown_below) for prediction in found]
    if out is not None:
        write_atomic(out, _csv(records))
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


def _walk(places: list[Path]) -> list[Path]:
    """The images named, and those in the folders named, each folder sorted."""
    from duallora.images import find_images

    paths: list[Path] = []
    for place in places:
        if not place.is_dir():
            paths.append(place)
            continue
        inside = find_images(place)
        if not inside:
            raise DualLoRAError(f"the folder {place} holds no images; name another one.")
        paths += inside
    for path in paths:
        if not path.exists():
            raise DualLoRAError(f"{path} does not exist; check the path.")
    return paths


def _record(prediction: Prediction, unknown_below: float | None) -> dict[str, Any]:
    unknown = unknown_below is not None and 1 - prediction.unknown < unknown_below
    return {
        "path": prediction.path,
        "class": UNKNOWN if unknown else prediction.label,
        "probability": prediction.probability,
        "task": prediction.task,
        "task_confidence": prediction.task_confidence,
        "unknown": prediction.unknown,
        "top": [{"class": name, "probability": probability} for name, probability in prediction.top],
    }


def _csv(records: list[dict[str, Any]]) -> bytes:
    """One line an image; the top classes in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ["path", "class", "probability", "task", "task_confidence", "unknown"]
    places = range(1, max(len(record["top"]) for record in records) + 1)
    writer.writerow([*fields, *(f"{what}_{place}" for place in places for what in ("class", "probability"))])
    for record in records:
        best = [value for entry in record["top"] for value in (entry["class"], entry["probability"])]
        writer.writerow([*(record[field] for field in fields), *best])
    return text.getvalue().encode("utf-8", "surrogateescape")
