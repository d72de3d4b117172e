"""The model being served, and the generations that replace it while requests go on."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.learner import ContinualLearner
from duallora.methods.saved_state import description
from duallora.outputs import Prediction
from duallora.predictions import predictions
from duallora.runtime.compute import Machine
from duallora.storage import checkpoint

_LAST_LOOK = 2.0  # seconds that the end waits for a generation that is being read
_RETRY = 10.0  # seconds; files of a model that is being copied may come after its model.json


@dataclass(frozen=True)
class ServedModel:
    """One generation, which never changes.

    Attributes:
        generation: the name of its weight file.
        learner: answers.
        about: what it holds.
    """

    generation: str
    learner: ContinualLearner
    about: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, machine: Machine, exact_readouts: bool = True) -> ServedModel:
        """Reads the current generation, and asks it once.

        Args:
            folder: of the saved model.
            machine: where it answers.
            exact_readouts: as for :class:`ContinualLearner`.

        Raises:
            DualLoRAError: it is missing, damaged, has learned nothing, or answers with what is no number.
        """
        manifest, tensors = checkpoint.read(folder)
        learner = ContinualLearner.restored(folder, manifest, tensors, machine, exact_readouts=exact_readouts)
        model = cls(manifest["weights"], learner, description(folder, manifest, tensors))
        height, width = learner.backbone.info.input_size[1:]
        grey = model.preprocess(Image.new("RGB", (width, height), "grey"))
        (found,) = model.answer(grey[None], 1)
        if not (math.isfinite(found.probability) and math.isfinite(found.unknown)):
            raise DualLoRAError(f"the model in {folder} answers with what is no number; teach it again.")
        return model

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image as the backbone takes it."""
        return self.learner.preprocess(image)

    def answer(self, images: Tensor, top: int) -> list[Prediction]:
        """What is on each image (n, 3, H, W); ``top`` beyond the number of classes gives all."""
        learner = self.learner
        outputs = learner.outputs_of([images])
        tasks = [task.name for task in learner.tasks]
        return predictions(outputs, learner.classes, tasks, [None] * len(images), top)


def signature(folder: Path) -> tuple[int, int, int] | None:
    """Another one for every generation in a folder, without reading it; None where there is no model."""
    try:
        found = (folder / "model.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class ModelWatch:
    """Holds the current generation of a saved model and looks for a new one.

    Requests take :attr:`current` once and keep it: one that began with an old generation ends with it.

    Args:
        folder: of the saved model.
        device: where to compute; a machine answers in its own precision, a device by its name in fp32.
        tell: gets a line for every generation that is taken or refused.
        interval: seconds between two looks.

    Attributes:
        current: what answers now.
        refused: why the newest generation is not served; None where it is.
        taken: generations taken since the start, the first one left out.
        refusals: generations refused since the start.

    Raises:
        DualLoRAError: there is no sound model.
    """

    def __init__(
        self,
        folder: Path,
        device: str | Machine = "auto",
        tell: Callable[[str], None] = lambda line: None,
        interval: float = 1.0,
    ) -> None:
        self.folder, self.tell, self.interval = folder, tell, interval
        self._exact = isinstance(device, str)
        self.machine = Machine.of(device)
        self._seen = signature(self.folder)
        self.current = ServedModel.load(folder, self.machine, self._exact)
        self.refused: str | None = None
        self.taken = self.refusals = 0
        self._retry = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Looks for new generations from now on, in a thread of its own."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="duallora-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the looking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_LAST_LOOK)
            self._thread = None

    def check(self) -> None:
        """Looks once; a generation that cannot be loaded leaves the current one in its place."""
        found = signature(self.folder)
        new = found != self._seen
        if not new and (self.refused is None or time.monotonic() < self._retry):
            return
        self._seen = found
        try:
            if checkpoint.read_manifest(self.folder)["weights"] != self.current.generation:
                self.current = ServedModel.load(self.folder, self.machine, self._exact)
                self.taken += 1
                self.tell(f"now serving {self.current.generation}")
            self.refused = None
        except Exception as error:  # whatever is wrong with a generation, the old one goes on
            sentence = " ".join(f"{error}".split()) or type(error).__name__
            self._retry = time.monotonic() + _RETRY
            if new or self.refused is None:
                self.refusals += 1
                self.tell(f"a new generation is refused, {self.current.generation} stays: {sentence}")
            self.refused = sentence
        gc.collect()  # modules of an old generation refer to each other
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.check()
