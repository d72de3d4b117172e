"""``duallora learn``: teaches a folder of images to a saved model."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.number_ranges import LARGEST_SEED, require_range
from duallora.errors import DualLoRAError
from duallora.teaching.method_choice import UNSAID, MethodChoice

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.streams import FolderDataset
    from duallora.teaching.training_images import Lesson

STRONGER = (
    "The embedded backbone is small (64x64 images); take a stronger one for a new model with "
    "--backbone vit_base_patch16_224.augreg_in21k, or any other timm ViT by its full tag."
)
_STEP = 3  # forward passes that a training step costs, about
_SAMPLE = 16  # images that --dry-run times


def learn(
    model: Path,
    folder: Path,
    *,
    name: str | None = None,
    check: Path | None = None,
    max_drop: float = 0.02,
    dry_run: bool = False,
    skip_bad_images: bool = False,
    method: MethodChoice | None = None,
    backbone: str | None = None,
    backbone_file: Path | None = None,
    augment: str | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Teach a folder of images to a saved model, or to a new one.

    Without val/, every tenth image of each class is held back to measure accuracy on. A model keeps its
    method and backbone; epochs, batch size, learning rates, seed and augmentation can be set for each task.

    Args:
        model: folder of the saved model; created when it does not exist
        folder: images in FOLDER/<class>/, or in train/ and val/ below it
        name: name of the task; where it is not given, that of the folder
        check: labelled images of known classes; accuracy on them is compared before and after
        max_drop: a larger drop of that accuracy leaves the model as it was (exit code 3)
        dry_run: print classes, counts, bad images and expected minutes, and write nothing
        skip_bad_images: leave files out that are no readable images, instead of refusing the folder
        method: what learns
        backbone: of a new model, embedded (default) or a timm ViT by its full tag
        backbone_file: local .safetensors file with the backbone's weights, copied into the model
        augment: views of the training images: crop, crop=SHARE and flip joined by a comma, or none (new
            models: crop,flip)
        seed: of initialisation, image order and augmentation (new models: 0)
        device: where to compute
    """
    require_range("--max-drop", max_drop, 0, 1)
    require_range("--seed", seed, 0, LARGEST_SEED)
    if name is not None and not name.strip():
        raise DualLoRAError("--name must not be empty; leave it out to name the task after the folder.")

    from duallora.runtime.progress import Progress
    from duallora.storage import checkpoint
    from duallora.teaching.measure import Comparison, Measured, Outcome
    from duallora.teaching.model_request import Wishes
    from duallora.teaching.training_images import Lesson, labelled

    progress = Progress()
    wishes = Wishes(method or UNSAID, backbone, backbone_file, seed, augment, device)
    _check_names(wishes.stored(model), model, name, check)
    skip = skip_bad_images or dry_run  # which lists them
    lesson = Lesson.read(folder, progress, skip_bad_images=skip)
    check_data = None if check is None else labelled(check, progress, skip_bad_images=skip)
    bad_images = [*lesson.bad_images, *([] if check_data is None else check_data.bad_images)]
    if dry_run:
        learner = wishes.open(model, progress)
        _check_classes(lesson, check_data, learner)
        with wishes.granted(learner):
            _tell_plan(lesson, learner, name or _task_name(folder, learner))
        _tell_bad_images(bad_images, skip_bad_images)
        console.line("nothing was written")
        return
    with checkpoint.exclusive(model):
        # Asked again under the lock: another process may have written since.
        _check_names(wishes.stored(model), model, name, check)
        learner = wishes.open(model, progress)
        _check_classes(lesson, check_data, learner)
        known, comparison = list(learner.classes), None
        before = Measured.on(learner, check_data)
        with wishes.granted(learner):
            record = learner.learn(lesson.train, name or _task_name(folder, learner))
        after = Measured.on(learner, check_data)
        if before is not None and after is not None:
            comparison = Comparison(before.accuracy, after.accuracy)
            comparison.require(max_drop)
        held_back = Measured.on(learner, lesson.held_back)
        if held_back is not None:
            held_back.note(learner)
        outcome = Outcome.of(record, known, held_back, after)
        learner.commit(model)
    # Printed when all is saved: a reader of this output that goes away must not cost the model.
    if bad_images:
        console.line(f"bad images left out: {len(bad_images)}")
    console.line(
        f"{model} has learned {record.name}: {len(record.classes)} classes, {record.train_images} images"
    )
    if comparison is not None:
        comparison.tell()
    outcome.tell()
    console.final_feature(learner.backbone)
    if learner.backbone.info.name == "embedded":
        console.line(STRONGER)


def _check_names(stored: dict[str, Any] | None, model: Path, name: str | None, check: Path | None) -> None:
    if stored is None and check is not None:
        raise DualLoRAError(
            f"there is no model in {model} yet to --check; leave --check out for a first task."
        )
    if stored is not None and name in [task["name"] for task in stored["tasks"]]:
        raise DualLoRAError(f"{model} has learned a task named {name} already; give another --name.")


def _check_classes(lesson: Lesson, check: FolderDataset | None, learner: ContinualLearner) -> None:
    unknown = [] if check is None else [name for name in check.classes if name not in learner.classes]
    if unknown:
        raise DualLoRAError(
            f"the --check images have a class {unknown[0]} that the model has not learned; give images of "
            "classes that it knows."
        )
    known = {*lesson.train.classes, *learner.classes}
    held_back = [] if lesson.held_back is None else lesson.held_back.classes
    unknown = [name for name in held_back if name not in known]
    if unknown:
        raise DualLoRAError(f"val/ has a class {unknown[0]} that train/ has not; give both the same classes.")


def _task_name(folder: Path, learner: ContinualLearner) -> str:
    """The folder's name, with a number where the model has learned a task of that name."""
    taken = {task.name for task in learner.tasks}
    base = folder.resolve().name or "task"
    candidates = [base, *(f"{base} {number}" for number in range(2, len(taken) + 2))]
    return next(name for name in candidates if name not in taken)


def _tell_plan(lesson: Lesson, learner: ContinualLearner, name: str) -> None:
    """What learning these images would mean."""
    classes, held_back = lesson.train.classes, lesson.held_back
    trained = Counter(classes[target] for target in lesson.train.targets)
    tested = Counter() if held_back is None else Counter(held_back.classes[t] for t in held_back.targets)
    totals = f"{trained.total()} images to learn from, {tested.total()} held back"
    console.line(f"task {name}: {len(classes)} classes, {totals}")
    known = {each: "yes" if each in learner.classes else "no" for each in classes}
    console.rows(
        ["class", "images", "held back", "known"],
        [[each, str(trained[each]), str(tested[each]), known[each]] for each in classes],
    )
    minutes = max(0.1, _expected_minutes(lesson, learner))
    console.line(f"expected time: {minutes:.1f} minutes on {learner.device.type}")


def _tell_bad_images(paths: list[Path], skip_bad_images: bool) -> None:
    refused = bool(paths) and not skip_bad_images
    remedy = "; remove them, or leave them out with --skip-bad-images" if refused else ""
    console.line(f"bad images: {len(paths)}{remedy}")
    for path in paths:
        console.line(f"  {path}")


def _expected_minutes(lesson: Lesson, learner: ContinualLearner) -> float:
    """From the time of a few forward passes, and of reading the images once."""
    import torch

    from duallora.methods.config import epochs_for

    images = torch.zeros(_SAMPLE, *learner.backbone.info.input_size, device=learner.device)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            learner.backbone(images).cpu()
            seconds.append(time.perf_counter() - start)
    epochs = epochs_for(learner.config, len(lesson.train)) if len(lesson.train.classes) > 1 else 0
    passes = 2 + _STEP * epochs  # one before and one after training, and the training steps
    computing = min(seconds) / _SAMPLE * len(lesson.train) * passes
    return (computing + lesson.seconds * (2 + epochs)) / 60
