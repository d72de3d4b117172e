"""``duallora learn``: teaches a folder of images to a saved model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.choice import UNSAID, MethodChoice
from duallora.errors import CheckFailed, DualLoRAError

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import Evaluation, TaskRecord
    from duallora.progress import Progress
    from duallora.streams import FolderDataset, TaskDataset

STRONGER = (
    "the embedded backbone is a small one for 64x64 images; a new model learns better with a stronger one: "
    "--backbone vit_base_patch16_224.augreg_in21k (any timm ViT by its full tag) or --backbone-file FILE"
)
_SHOWN = 3  # old classes in the list of confusions, and bad images in the one of --dry-run


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the command line says of a model; None is what the model stores, or the default of a new one."""

    method: MethodChoice
    backbone: str | None
    backbone_file: Path | None
    seed: int | None
    augment: str | None
    device: str


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
    augment: Literal["crop,flip", "crop", "none"] | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Teach a folder of images to a saved model, or to a new one.

    Without val/, every tenth image of each class is held back to measure accuracy on. What is not given of
    method, backbone, seed and augmentation is as the model stores it.

    Args:
        model: folder of the saved model; created when it does not exist
        folder: images in FOLDER/<class>/, or in train/ and val/ below it
        name: name of the task; the folder's name where it is not given
        check: labelled images of known classes; accuracy on them is compared before and after
        max_drop: a larger drop of that accuracy leaves the model as it was (exit code 3)
        dry_run: print classes, counts, bad images and expected minutes, and write nothing
        skip_bad_images: leave files out that are no readable images, instead of refusing the folder
        method: what learns; cannot be changed afterwards
        backbone: embedded (default of a new model), or a timm ViT by its full tag; cannot be changed afterwards
        backbone_file: local .safetensors file with the backbone's weights, copied into the model
        augment: views of the training images (default of a new model: crop,flip)
        seed: of initialisation, image order and augmentation (default of a new model: 0)
        device: where to compute
    """
    if not 0 <= max_drop <= 1:
        raise DualLoRAError(f"--max-drop must be a share of accuracy from 0 to 1, not {max_drop}.")
    if name is not None and not name.strip():
        raise DualLoRAError("--name must not be empty; leave it out to name the task after the folder.")

    from duallora import checkpoint
    from duallora.progress import Progress

    progress = Progress()
    wishes = Wishes(method or UNSAID, backbone, backbone_file, seed, augment, device)
    _check_wishes(model, wishes, check)
    data = Lesson.read(folder, progress, skip_bad_images=skip_bad_images, only_look=dry_run)
    if dry_run:
        _tell_plan(data, model, wishes, progress)
        return
    check_data = None if check is None else _labelled(check, progress)
    with checkpoint.exclusive(model):
        _check_wishes(model, wishes, check)  # again: another process may have written until now
        learner = _open(model, wishes, progress)
        known = list(learner.classes)
        before = None if check_data is None else learner.evaluate(check_data)
        with _asked_for(learner, wishes):
            record = learner.learn(data.train, name or _free_name(folder, learner))
        result = Result.measure(learner, record, known, data.held_back, check_data, before)
        result.compare(max_drop)
        learner.commit(model)
    result.tell(model, data)
    if learner.backbone.info.name == "embedded":
        console.line(STRONGER)
