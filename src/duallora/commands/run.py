"""``duallora run``: the main job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.choice import UNSAID, MethodChoice
from duallora.commands.ranges import LARGEST_SEED, require_range

if TYPE_CHECKING:
    from duallora.progress import Progress
    from duallora.streams import Stream


def run(
    *,
    out: Path,
    stream: str = "digits",
    domains: str | None = None,
    tasks: int | None = None,
    order: int | Literal["alphabetical"] = 1993,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    method: MethodChoice = UNSAID,
    backbone: str = "embedded",
    backbone_file: Path | None = None,
    augment: Literal["crop,flip", "crop", "none"] | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Learn a stream of tasks one after another and write the results: the main job.

    An unfinished folder is resumed after its last finished task; a finished or foreign one is refused.

    Args:
        out: folder for results.json, report.md, accuracy.png, predictions.csv, log.jsonl and model/
        stream: digits, or a folder of images with train/ and val/
        domains: show the same images in several domains, one task each, separated by commas: photo, edges,
            negative, pixelated, posterised
        tasks: number of tasks; where it is not given, 5 for digits and 10 for a folder
        order: seed of the class order (1993 is the usual one of benchmarks), or alphabetical
        classes: take the first so many of the sorted class names
        train_per_class: take the first so many training images of each class
        holdout: test on the next so many training images of each class; val/ is not read then
        method: what learns
        backbone: embedded, or a timm ViT by its full tag
        backbone_file: local .safetensors file with the backbone's weights
        augment: views of the training images; where it is not given, crop for digits and crop,flip otherwise
        seed: of initialisation, image order and augmentation
        device: where to compute
    """
    require_range("--seed", seed, 0, LARGEST_SEED)
    config = method.config()

    from duallora import streams
    from duallora.learner import ContinualLearner
    from duallora.progress import Progress
    from duallora.protocol import run_stream
    from duallora.report import accuracy_table

    progress = Progress()
    shown = tuple(name.strip() for name in domains.split(",")) if domains is not None else ()
    options: dict[str, Any] = {
        "tasks": tasks,
        "order": order,
        "classes": classes,
        "train_per_class": train_per_class,
        "holdout": holdout,
        "domains": shown,
    }
    loaded = streams.load(stream, **options)
    policy = augment or loaded.augmentation
    # Made before the folder is touched, so that an unknown backbone or device leaves nothing behind.
    learner = ContinualLearner(
        backbone, config, seed, backbone_file=backbone_file, device=device, augment=policy, progress=progress
    )
    if stream != "digits":
        _check_images(loaded, shown, progress)
    asked = {
        "method": {"name": learner.method_name, **dataclasses.asdict(config)},
        "backbone": backbone,
        "augment": policy,
        "seed": seed,
        **options,
    }
    results = run_stream(lambda: learner, loaded, out, asked, device=device, progress=progress)
    console.table(accuracy_table(results))
    console.line(f"report: {out / 'report.md'}")


def _check_images(stream: Stream, domains: tuple[str, ...], progress: Progress) -> None:
    """Decodes every image once, so that a bad one is named before the run has begun."""
    # All domains show the same images.
    for task in stream.tasks[:1] if domains else stream.tasks:
        for part in (task.train, task.test):
            for index in progress.track(range(len(part)), len(part), f"checking the images of {task.name}"):
                part[index]
