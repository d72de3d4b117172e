"""``duallora learn``: teaches a folder of images to a saved model."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.number_ranges import LARGEST_SEED, require_range
from duallora.errors import DualLoRAError
from duallora.runtime.loggers import Logging
from duallora.teaching.method_choice import UNSAID, MethodChoice

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.teaching.lesson import Learned
    from duallora.teaching.training_images import TrainingImages

STRONGER = (
    "The embedded backbone is small (64x64 images); take a stronger one for a new model with "
    "--backbone vit_base_patch16_224.augreg_in21k, or any other timm ViT by its full tag."
)
_STEP = 3  # forward passes that a training step costs, about
_SHOWN = 3  # old classes that new ones are confused with
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
    image_size: int | None = None,
    augment: str | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    log: Logging = Logging(),
) -> None:
    """Teach a folder of images to a saved model, or to a new one.

    Without val/, every tenth image of each class is held back to measure accuracy on. A model keeps its
    method, backbone and image size; epochs, batch size, learning rates, seed and augmentation can be set for
    each task.

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
        image_size: of a new model, height and width of the input in pixels, where it is not that of the
            pre-training
        augment: views of the training images: crop, crop=SHARE and flip joined by a comma, or none (new
            models: crop,flip)
        seed: of initialisation, image order and augmentation (new models: 0)
        device: where to compute
        log: where figures go while it trains
    """
    require_range("--max-drop", max_drop, 0, 1)
    require_range("--seed", seed, 0, LARGEST_SEED)
    if name is not None and not name.strip():
        raise DualLoRAError("--name must not be empty; leave it out to name the task after the folder.")

    log.check()

    from duallora.runtime.progress import Progress
    from duallora.sharing.place import own_folder
    from duallora.storage.documents import percent
    from duallora.teaching.lesson import Lesson
    from duallora.teaching.model_request import ModelRequest
    from duallora.teaching.training_images import TrainingImages, labelled

    progress = Progress()
    request = ModelRequest(method or UNSAID, backbone, backbone_file, seed, augment, device, image_size)
    _check_names(request.stored(own_folder(model)), model, name, check)
    skip = skip_bad_images or dry_run  # which lists them
    images = TrainingImages.read(folder, progress, skip_bad_images=skip)
    check_data = None if check is None else labelled(check, progress, skip_bad_images=skip)
    bad_images = [*images.bad_images, *([] if check_data is None else check_data.bad_images)]
    base = folder.resolve().name or "task"
    lesson = Lesson(model, request, images, name, base, check_data, max_drop)
    if dry_run:
        learner = lesson.open(progress)
        with request.granted(learner):
            _tell_plan(images, learner, lesson.name_for(learner))
        _tell_bad_images(bad_images, skip_bad_images)
        console.line("nothing was written")
        return
    about = {"model": str(model), "folder": str(folder)}
    saved = model.resolve()
    logs = saved.with_name(f"{saved.name}-logs")
    with log.recording(logs, about) as progress.figures, lesson.taught(progress) as learned:
        pass
    # Printed when all is saved: a reader of this output that goes away must not cost the model.
    if bad_images:
        console.line(f"bad images left out: {len(bad_images)}")
    record, found = learned.record, learned.learner.backbone
    console.line(
        f"{model} has learned {record.name}: {len(record.classes)} classes, {record.train_images} images"
    )
    if record.kept_accuracy is not None:
        share = f"{percent(record.kept_accuracy)} % of {record.kept_images} held-back images"
        console.line(f"epoch {record.kept_epoch} of {record.epochs} kept: {share}")
    _tell_measured(learned)
    console.final_feature(found)
    if found.info.name == "embedded":
        console.line(STRONGER)


def _check_names(stored: dict[str, Any] | None, model: Path, name: str | None, check: Path | None) -> None:
    if stored is None and check is not None:
        raise DualLoRAError(
            f"there is no model in {model} yet to --check; leave --check out for a first task."
        )
    if stored is not None and name in [task["name"] for task in stored["tasks"]]:
        raise DualLoRAError(f"{model} has learned a task named {name} already; give another --name.")


def _tell_measured(learned: Learned) -> None:
    """The figures of a lesson."""
    from duallora.storage.documents import percent
    from duallora.teaching.measure import confused

    if learned.comparison is not None:
        before, after = percent(learned.comparison.before), percent(learned.comparison.after)
        console.line(f"accuracy on the --check images: {before} % before, {after} % after")
    held_back = learned.held_back
    if held_back is None:
        console.line("held-back accuracy: not measured, no class has ten images; give some in val/")
    else:
        share, error = percent(held_back.accuracy), held_back.calibration_error
        console.line(f"held-back accuracy: {share} % on {len(held_back.answers)} images")
        console.line(f"calibration error: {'-' if error is None else f'{error:.3f}'}")
        below = learned.record.unknown_below
        if below is not None:
            console.line(
                f"unknown below a familiarity of {below:.2f}: by these images, 95 % of new ones are above"
            )
    counts = confused(learned.known, learned.record.classes, [held_back, learned.check])
    if counts is not None:
        worst = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_SHOWN))
        console.line(f"old classes most often confused with the new ones: {worst or 'none'}")


def _tell_plan(images: TrainingImages, learner: ContinualLearner, name: str) -> None:
    """What learning these images would mean."""
    classes, held_back = images.train.classes, images.held_back
    trained = Counter(classes[target] for target in images.train.targets)
    tested = Counter() if held_back is None else Counter(held_back.classes[t] for t in held_back.targets)
    totals = f"{trained.total()} images to learn from, {tested.total()} held back"
    console.line(f"task {name}: {len(classes)} classes, {totals}")
    known = {each: "yes" if each in learner.classes else "no" for each in classes}
    console.rows(
        ["class", "images", "held back", "known"],
        [[each, str(trained[each]), str(tested[each]), known[each]] for each in classes],
    )
    minutes = max(0.1, _expected_minutes(images, learner))
    console.line(f"expected time: {minutes:.1f} minutes on {learner.device.type}")


def _tell_bad_images(paths: list[Path], skip_bad_images: bool) -> None:
    refused = bool(paths) and not skip_bad_images
    remedy = "; remove them, or leave them out with --skip-bad-images" if refused else ""
    console.line(f"bad images: {len(paths)}{remedy}")
    for path in paths:
        console.line(f"  {path}")


def _expected_minutes(images: TrainingImages, learner: ContinualLearner) -> float:
    """From the time of a few forward passes, and of reading the images once."""
    import torch

    from duallora.methods.config import epochs_for

    batch = torch.zeros(_SAMPLE, *learner.backbone.info.input_size, device=learner.device)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            learner.backbone(batch).cpu()
            seconds.append(time.perf_counter() - start)
    trained = len(images.train.classes) > 1
    epochs = epochs_for(learner.config, len(images.train), len(learner.tasks)) if trained else 0
    passes = 2 + _STEP * epochs  # one before and one after training, and the training steps
    computing = min(seconds) / _SAMPLE * len(images.train) * passes
    return (computing + images.seconds * (2 + epochs)) / 60
