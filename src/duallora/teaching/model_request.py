"""What a lesson asks of a model, beside the images, compared with what the saved model stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.backbones.backbone import EMBEDDED, load_backbone
from duallora.errors import DualLoRAError
from duallora.learner import ContinualLearner
from duallora.storage import checkpoint
from duallora.storage.atomic import sha256_of
from duallora.storage.copied import require_free
from duallora.teaching.method_choice import MethodChoice

if TYPE_CHECKING:
    from duallora.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """What is asked of a model; None is what the model stores, or the default of a new one."""

    method: MethodChoice
    backbone: str | None = None
    backbone_file: Path | None = None
    seed: int | None = None
    augment: str | None = None
    device: str = "auto"
    image_size: int | None = None

    def stored(self, model: Path) -> dict[str, Any] | None:
        """What the saved model says of itself; None where there is none yet.

        Raises:
            DualLoRAError: It was made with another method or backbone, lacks what a model says of itself, or
                the folder is no place for one.
        """
        if not (model / "model.json").exists():
            require_free(model)  # MODEL and FOLDER are easily swapped
            self.method.config()
            return None
        manifest = checkpoint.read_manifest(model)
        with checkpoint.intact(model):
            _ = [task["name"] for task in manifest["tasks"]]
            self.method.check_against(manifest["method"], manifest["config"])
            self._check_backbone(manifest["backbone"])
        return manifest

    def open(self, model: Path, progress: Progress) -> ContinualLearner:
        """The saved learner, or a new one.

        Raises:
            DualLoRAError: The model is damaged, or the backbone or the device cannot be used.
        """
        if self.stored(model) is not None:
            return ContinualLearner.load(model, device=self.device, progress=progress)
        name = self.backbone or EMBEDDED
        sized = self.image_size is not None
        return ContinualLearner(
            load_backbone(name, self.backbone_file, image_size=self.image_size) if sized else name,
            self.method.config(),
            self.seed or 0,
            backbone_file=self.backbone_file,
            device=self.device,
            augment=self.augment or "crop,flip",
            progress=progress,
        )

    @contextmanager
    def granted(self, learner: ContinualLearner) -> Iterator[None]:
        """Inside, the learner trains as asked for; afterwards it is set as before, which is what is saved."""
        config = dataclasses.replace(learner.config, **self.method.fields)
        seed = learner.seed if self.seed is None else self.seed
        with learner.lesson(config, seed, self.augment or learner.augment):
            yield

    def _check_backbone(self, stored: dict[str, Any]) -> None:
        name, sha256, (_, height, width) = stored["name"], stored["sha256"], stored["input_size"]
        remedy = "leave it out, or teach the folder to a new model."
        if self.backbone is not None and self.backbone != name:
            raise DualLoRAError(f"the model was made with --backbone {name}, not {self.backbone}; {remedy}")
        if self.image_size is not None and {self.image_size} != {height, width}:
            raise DualLoRAError(
                f"the model takes images of {height} x {width} pixels, not of --image-size "
                f"{self.image_size}; {remedy}"
            )
        if self.backbone_file is None:
            return
        try:
            found = sha256_of(self.backbone_file)
        except OSError as error:
            raise DualLoRAError(f"--backbone-file {self.backbone_file} cannot be read; check it.") from error
        if found != sha256:
            raise DualLoRAError(
                f"the model was made with a backbone of sha256 {sha256[:12]}, and --backbone-file "
                f"{self.backbone_file} has {found[:12]}; {remedy}"
            )
