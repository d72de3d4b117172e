"""``duallora run``: the main job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.choice import DEFAULT_METHOD, UNSAID, MethodChoice
from duallora.commands.ranges import LARGEST_SEED, require_range

if TYPE_CHECKING:
    from duallora.backbones import Backbone
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

    from duallora.run_directory import require_unfinished

    require_unfinished(out)

    from duallora import streams
    from duallora.backbones import load_backbone
    from duallora.learner import ContinualLearner
    from duallora.progress import Progress
    from duallora.protocol import run_stream
    from duallora.report import accuracy_table
    from duallora.train import make_fabric

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
    make_fabric(device)  # a device that is not there is refused before large weights are read
    weights = load_backbone(backbone, backbone_file)
    asked = {
        "method": {"name": method.name or DEFAULT_METHOD, **dataclasses.asdict(config)},
        **_asked_backbone(backbone, backbone_file, weights),
        "augment": policy,
        "seed": seed,
        **options,
    }

    def learner() -> ContinualLearner:
        made = ContinualLearner(weights, config, seed, device=device, augment=policy, progress=progress)
        if stream != "digits":
            _check_images(loaded, shown, progress)
        return made

    results = run_stream(learner, loaded, out, asked, device=device, progress=progress, backbone=weights)
    console.table(accuracy_table(results))
    console.final_feature(weights)
    console.line(f"report: {out / 'report.md'}")


def _asked_backbone(name: str, file: Path | None, weights: Backbone) -> dict[str, Any]:
    """What tells one backbone from another: other weights under the same name are another run."""
    file_name = None if file is None else file.name
    return {"backbone": name, "backbone_file": file_name, "backbone_sha256": weights.info.sha256}


def _check_images(stream: Stream, domains: tuple[str, ...], progress: Progress) -> None:
    """Decodes every image once, so that a bad one is named before the run has begun."""
    # All domains show the same images.
    for task in stream.tasks[:1] if domains else stream.tasks:
        for part in (task.train, task.test):
            for index in progress.track(range(len(part)), len(part), f"checking the images of {task.name}"):
                part[index]
