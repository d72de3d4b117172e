"""ContinualLearner: learn tasks one after another, predict without the task, save and load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from duallora.backbones.backbone import Backbone, BackboneInfo, load_backbone
from duallora.backbones.compiling import uncompiled
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.data.asked import asked
from duallora.data.loader import ImageLoader
from duallora.data.one_by_one import one_by_one
from duallora.data.transforms import Augmentation, evaluation_transform
from duallora.errors import DualLoRAError
from duallora.forgetting import Forgotten, forget
from duallora.methods import METHODS, Method, MethodConfig, MethodContext, TaskInfo, method_name
from duallora.methods.config import RETIRED_FIELDS
from duallora.methods.duallora_config import DualLoRAConfig
from duallora.outputs import Evaluation, Outputs, Prediction, TaskRecord, new_name, rows_of
from duallora.predictions import evaluation, predictions
from duallora.runtime import parallel
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress
from duallora.sharing.local import local_folder
from duallora.sharing.place import own_folder
from duallora.storage import checkpoint
from duallora.storage.soundness import check
from duallora.streams.names import hint_at_case
from duallora.streams.task import as_task_dataset, of_classes, without_empty_classes
from duallora.training import EVALUATION_BATCH, evaluated, learn_task


class ContinualLearner:
    """A pre-trained Vision Transformer that learns new tasks and keeps no old images.

    Args:
        backbone: ``"embedded"``, the full tag of a timm ViT, or a loaded :class:`.Backbone`.
        method: configuration of the method, for instance :class:`.DualLoRAConfig`.
        seed: keys every random draw, with the task, the epoch and the sample.
        backbone_file: local ``.safetensors`` file with the backbone's weights.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``; or a :class:`.Machine`, for several processes
            and everything else of :class:`.Compute`.
        augment: ``"crop,flip"``, ``"crop"`` or ``"none"``.
        progress: where to report; the default is silent.
        features: of the bare backbone, for methods that read them; they change no result.
        exact_readouts: predictions in fp32 whatever the precision of the machine, because bf16 would round by
            batch size; a measurement of speed may do without.

    Attributes:
        tasks: records of the tasks learned so far.
        classes: names of all classes in the order in which they were first seen.

    Raises:
        DualLoRAError: if the backbone, the device or a field of the method cannot be used.
    """

    def __init__(
        self,
        backbone: str | Backbone = "embedded",
        method: MethodConfig | None = None,
        seed: int = 0,
        *,
        backbone_file: str | Path | None = None,
        device: str | Machine = "auto",
        augment: str = "crop,flip",
        progress: Progress | None = None,
        features: FrozenFeatures | None = None,
        exact_readouts: bool = True,
    ) -> None:
        config = method if method is not None else DualLoRAConfig()
        self.config, self.seed, self.augment = config, seed, augment
        self.method_name = method_name(config)
        self.progress = progress if progress is not None else Progress(quiet=True)
        self.machine = Machine.of(device)
        self.backbone = load_backbone(backbone, backbone_file) if isinstance(backbone, str) else backbone
        self.backbone.to(self.machine.device)

        def autocast() -> AbstractContextManager[None]:
            return self.machine.autocast(self.backbone.compiled)

        context = MethodContext(autocast, nullcontext if exact_readouts else autocast, features)
        self.method: Method = METHODS[self.method_name].method(self.backbone, config, seed, context)
        self.preprocess = evaluation_transform(self.backbone.info)
        self.loader = ImageLoader(self.machine.device, self.machine.workers, self.machine.image_bytes)
        if self.machine.compute.compile:
            self.backbone.compile()
        Augmentation(self.backbone.info, augment, seed, 0)  # refuses an unknown policy now, not in a task
        self.tasks: list[TaskRecord] = []
        self.classes: list[str] = []
        self._unfinished: str | None = None
        self._origin: tuple[Path, str] | None = None  # where this state was loaded from or saved to last

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.machine.device

    @property
    def forward_passes(self) -> int:
        """Backbone passes per image at inference."""
        return self.method.passes

    def learn(
        self, dataset: Dataset[Any], name: str | None = None, *, held_back: Dataset[Any] | None = None
    ) -> TaskRecord:
        """Learns a task from labelled images; nothing of them is kept but statistics.

        Args:
            dataset: any map-style data set of (PIL image or tensor, int) with class names in ``classes``.
            name: of the task; default ``task N``.
            held_back: other labelled images; the epoch that names the most of those of its classes is kept.

        Raises:
            DualLoRAError: if the data set or the name cannot be used: the learner is as it was then. After
                any other error or interruption it has to be loaded again.
        """
        self._check_usable()
        data, classes = without_empty_classes(dataset)
        hint_at_case(classes, self.classes)
        name = new_name(name, self.tasks)
        if self.method.all_at_once and self.tasks:
            raise DualLoRAError(
                f"{self.method_name} learns all classes at once and has done so; "
                "join the tasks into one data set, or take another method."
            )
        task = TaskInfo(len(self.tasks), name, classes)
        augmentation = Augmentation(self.backbone.info, self.augment, self.seed, task.index)
        judged = None if held_back is None else of_classes(as_task_dataset(held_back), classes)
        self._unfinished = name
        if self.machine.compute.compile:
            torch.compiler.reset()  # a task changes the adapters: what was compiled for the last is no use
        timings = learn_task(
            self.method,
            task,
            data,
            judged,
            augmentation,
            self.preprocess,
            self.machine,
            self.loader,
            self.progress,
        )
        self._unfinished = None
        record = TaskRecord(
            name=name,
            classes=classes,
            learned_at=datetime.now(UTC).isoformat(timespec="seconds"),
            train_images=len(data),
            stored_bytes=sum(t.numel() * t.element_size() for t in self.method.state().values()),
            orthogonal_norm=self.method.orthogonal_norm if timings.trainable_parameters else None,
            residual_norm=self.method.residual_norm if timings.trainable_parameters else None,
            **asdict(timings),
        )
        self._add(record)
        return record

    def outputs(self, dataset: Dataset[Any]) -> Outputs:
        """Raw outputs for every image of a data set, in order; labels are not looked at.

        Where several processes run, each computes its share of the images and gets the outputs of all.
        """
        data = as_task_dataset(dataset)
        divided = len(data) >= parallel.size()
        own = parallel.share(len(data)) if divided else range(len(data))
        with (
            self.loader.reading(data, self.preprocess) as source,
            closing(self.loader.batches(source, evaluated(own), len(own))) as found,
        ):
            outputs = self.outputs_of(found)
        return outputs.gathered() if divided else outputs

    def outputs_of(self, images: Iterable[Tensor], *, cached: bool = True) -> Outputs:
        """Raw outputs for batches of preprocessed images.

        Args:
            images: batches (B, 3, H, W).
            cached: ``features`` may be used, where they were given.

        Raises:
            DualLoRAError: if nothing has been learned yet.
        """
        self._check_usable()
        if not self.tasks:
            raise DualLoRAError("this learner has learned nothing yet; call learn first.")
        readouts = [self.method.logits(batch.to(self.device), cached=cached) for batch in images]
        if not readouts:
            raise DualLoRAError("there are no images to look at; give at least one.")

        def joined(field: str) -> Any:
            parts = [getattr(readout, field) for readout in readouts]
            return None if parts[0] is None else torch.cat([p.float().cpu() for p in parts])

        fields = ("heads", "calibrated", "task_posterior", "familiarity", "gate", "features")
        found = {field: joined(field) for field in fields}
        if any(values is not None and bool(values.isnan().any()) for values in found.values()):
            raise DualLoRAError(
                "the model answers with what is no number: it is damaged, or an image is; teach it again, or "
                "restore it from a copy."
            )
        row_task, row_class = rows_of(self.tasks, self.classes)
        return Outputs(**found, row_task=row_task, row_class=row_class, readout=self.method.answer)

    def evaluate(self, dataset: Dataset[Any]) -> Evaluation:
        """Accuracy on labelled images, over all and per task; the model is not told which task they are of.

        Raises:
            DualLoRAError: if a class of the data set has not been learned.
        """
        self._check_usable()
        data, names = without_empty_classes(dataset)
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            shown = ", ".join(repr(name) for name in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
            raise DualLoRAError(f"the model has not learned {shown}; it knows {len(self.classes)} classes.")
        outputs = self.outputs(data)
        labels = torch.tensor([self.classes.index(names[t]) for t in data.targets])
        latest = {name: t for t, task in enumerate(self.tasks) for name in task.classes}
        true_task = torch.tensor([latest[self.classes[label]] for label in labels.tolist()])
        return evaluation(outputs, labels, true_task, self.classes, [task.name for task in self.tasks])

    def predict(self, images: Any, top: int = 3) -> list[Prediction]:
        """Says what is on each image: PIL images, tensors (CHW, uint8 or float in [0, 1]) or paths.

        Args:
            images: any iterable of them, or a data set with a length, taken in batches as they come, so that
                no more than a batch is held; or a single image, which gets a list of one answer.
            top: how many classes are given for each.

        Raises:
            DualLoRAError: if an image cannot be read (the file is named) or nothing has been learned.
        """
        found: list[Prediction] = []
        tasks = [task.name for task in self.tasks]
        if not self.tasks and any(True for _ in one_by_one(images)):
            self.outputs_of([])  # refuses at once, rather than after a batch of images
        for batch, paths in asked(images, self.loader, self.preprocess, EVALUATION_BATCH):
            # What is asked for is computed, and so is timed.
            outputs = self.outputs_of([batch], cached=False)
            found += predictions(outputs, self.classes, tasks, paths, top)
        return found

    def forget(self, *, task: str | None = None, name: str | None = None) -> Forgotten:
        """Takes back what was taught: one task, or one class from all tasks that taught it.

        Args:
            task: name of the task.
            name: name of the class; one of the two is given.

        Raises:
            DualLoRAError: there is none of that name, or it is all that the learner knows.
        """
        self._check_usable()
        return forget(self.method, self.tasks, self.classes, task=task, name=name)

    @contextmanager
    def lesson(self, config: MethodConfig, seed: int, augment: str) -> Iterator[None]:
        """Inside, tasks are trained as asked for; afterwards all is set as before, which is what is saved.

        Args:
            config: differs from the learner's own in how a task is trained.
            seed: of the random draws.
            augment: of the training images.
        """
        before = self.config, self.seed, self.augment
        self.config, self.seed, self.augment = config, seed, augment
        try:
            with self.method.lesson(config, seed):
                yield
        finally:
            self.config, self.seed, self.augment = before

    def save(self, path: str | Path) -> None:
        """Saves to a folder as one new generation; an interruption leaves the old one whole.

        Raises:
            DualLoRAError: if another process is writing there, or has written since this learner was loaded,
                or the disk is full.
        """
        with checkpoint.exclusive(own_folder(path)):
            self.commit(Path(path))

    def commit(self, folder: Path) -> None:
        """As :meth:`save`, for a caller that holds ``checkpoint.exclusive`` on the folder already."""
        self._check_usable()
        info = self.backbone.info
        manifest = {
            "package_version": version("duallora"),
            "backbone": info.to_dict() | {"file": None},  # the copy in the folder is named by its hash
            "method": self.method_name,
            "config": asdict(self.config),
            "seed": self.seed,
            "augment": self.augment,
            "classes": self.classes,
            "tasks": [task.to_dict() for task in self.tasks],
        }
        extra = {} if info.file is None else {"backbone": (Path(info.file), info.sha256)}
        place, known = self._origin if self._origin is not None else (None, None)
        known = known if place == folder.resolve() else None
        weights = checkpoint.commit(folder, manifest, self.method.state(), extra_files=extra, replaces=known)
        self._origin = (folder.resolve(), weights)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | Machine = "auto",
        progress: Progress | None = None,
        backbone: Backbone | None = None,
        features: FrozenFeatures | None = None,
        exact_readouts: bool = True,
    ) -> ContinualLearner:
        """Loads a saved learner; it predicts, and goes on learning, exactly as the one that was saved.

        Args:
            path: the folder, or ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION`` on the hub.
            device: where to compute, as for a new one.
            progress: where to report; the default is silent.
            backbone: the frozen backbone, if it cannot be loaded by its name.
            features: as for a new one.
            exact_readouts: as for a new one.

        Raises:
            DualLoRAError: if the folder holds no sound model, or the backbone is another than the model's.
        """
        folder = local_folder(path)
        manifest, tensors = checkpoint.read(folder)
        return cls.restored(folder, manifest, tensors, device, progress, backbone, features, exact_readouts)

    @classmethod
    def restored(
        cls,
        folder: Path,
        manifest: dict[str, Any],
        tensors: dict[str, Tensor],
        device: str | Machine = "auto",
        progress: Progress | None = None,
        backbone: Backbone | None = None,
        features: FrozenFeatures | None = None,
        exact_readouts: bool = True,
    ) -> ContinualLearner:
        """As :meth:`load`, from what ``checkpoint.read`` gave."""
        check(folder, manifest, tensors)
        with checkpoint.intact(folder):
            info = BackboneInfo.from_dict(manifest["backbone"])
            if backbone is None:
                copies = [folder / name for name in manifest["files"] if name.startswith("backbone-")]
                backbone = load_backbone(info, copies[0] if copies else None)
            info.refuse_other(backbone.info)
            entry = METHODS.get(manifest["method"])
            if entry is None:
                raise DualLoRAError(
                    f"the model uses method {manifest['method']!r}, unknown here; "
                    f"the methods are {', '.join(METHODS)}."
                )
            given = {name: x for name, x in manifest["config"].items() if name not in RETIRED_FIELDS}
            config = entry.config(**given)
            learner = cls(
                backbone,
                config,
                manifest["seed"],
                device=device,
                augment=manifest["augment"],
                progress=progress,
                features=features,
                exact_readouts=exact_readouts,
            )
            learner.method.load_state(tensors)
            for record in manifest["tasks"]:
                learner._add(TaskRecord.from_dict(record))
            learner._origin = (folder.resolve(), manifest["weights"])
            learner._try_out()
            return learner

    def _try_out(self) -> None:
        """Looks at a grey image: tensors whose shapes do not fit each other fail now, not at an answer."""
        if self.tasks:
            with uncompiled():  # compiling takes minutes, and this one pass none
                self.outputs_of([torch.zeros(1, *self.backbone.info.input_size)])

    def _add(self, record: TaskRecord) -> None:
        self.tasks.append(record)
        self.classes.extend(name for name in record.classes if name not in self.classes)

    def _check_usable(self) -> None:
        if self._unfinished is not None:
            raise DualLoRAError(
                f"learning {self._unfinished!r} did not finish, so this learner is between two states; "
                "load the saved model again."
            )
