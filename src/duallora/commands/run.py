"""``duallora run``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from duallora.commands import console
from duallora.commands.choice import DEFAULT_METHOD, UNSAID, MethodChoice
from duallora.commands.ranges import LARGEST_SEED, require_range
from duallora.commands.setting import Augment, Device, Order, Setting, load_setting

if TYPE_CHECKING:
    from duallora.progress import Progress


def run(
    *,
    out: Path,
    stream: str = "digits",
    domains: str | None = None,
    tasks: int | None = None,
    order: Order = 1993,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    method: MethodChoice = UNSAID,
    backbone: str = "embedded",
    backbone_file: Path | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    device: Device = "auto",
    features: Path | None = None,
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
        features: file of frozen features of un-augmented images, which compare keeps in its folder; what is
            missing in it is computed
    """
    require_range("--seed", seed, 0, LARGEST_SEED)
    config = method.config()

    from duallora.run_directory import require_unfinished

    require_unfinished(out)

    from duallora.features import FrozenFeatures
    from duallora.learner import ContinualLearner
    from duallora.methods import METHODS
    from duallora.progress import Progress
    from duallora.protocol import run_stream
    from duallora.report import accuracy_table
    from duallora.streams import all_at_once

    progress = Progress()
    setting = load_setting(
        stream,
        domains,
        tasks,
        order,
        classes,
        train_per_class,
        holdout,
        backbone,
        backbone_file,
        augment,
        device,
    )
    name = method.name or DEFAULT_METHOD
    learned = all_at_once(setting.stream) if METHODS[name].method.all_at_once else setting.stream
    known = None if features is None else FrozenFeatures.load(features, setting.backbone)

    def learner() -> ContinualLearner:
        made = ContinualLearner(
            setting.backbone, config, seed, device=device, augment=setting.augment, progress=progress
        )
        if stream != "digits":
            _check_images(setting, progress)
        return made

    results = run_stream(
        learner,
        learned,
        out,
        setting.asked(name, config, seed),
        device=device,
        progress=progress,
        backbone=setting.backbone,
        features=known,
    )
    console.table(accuracy_table(results))
    console.final_feature(setting.backbone)
    console.line(f"report: {out / 'report.md'}")


def _check_images(setting: Setting, progress: Progress) -> None:
    """Decodes every image once, so that a bad one is named before the run has begun."""
    tasks = setting.stream.tasks
    # All domains show the same images.
    for task in tasks[:1] if setting.options["domains"] else tasks:
        for part in (task.train, task.test):
            for index in progress.track(range(len(part)), len(part), f"checking the images of {task.name}"):
                part[index]
