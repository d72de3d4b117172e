"""The model behind the page: one at a time learns, everyone may ask, and what others write is picked up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.app.answers import Answer, answers
from duallora.app.intake import Check
from duallora.app.lesson_thread import Taught, Teaching, Watched, outcome
from duallora.app.undo_question import Step, first_lesson, lesson_name, quoted, step_back
from duallora.app.uploads import Uploads
from duallora.data.decoding import Decoders
from duallora.errors import DualLoRAError
from duallora.outputs import mean_threshold
from duallora.storage import checkpoint
from duallora.storage.regular import read_text
from duallora.training import EVALUATION_BATCH

if TYPE_CHECKING:
    from duallora.outputs import TaskRecord
    from duallora.serving.model_watch import ServedModel
    from duallora.teaching.model_request import ModelRequest

_DECODERS = 2  # processes; each handler of the page decodes one image at a time
_LAST_STEP = 3  # seconds that the end waits for a lesson
NOTHING_LEARNED = "the model has learned nothing yet; teach it something first, or the example under Teach."


class Session:
    """A saved model, or the place of one that is still to be made.

    Args:
        folder: of the model.
        request: what the command line said of it.
        uploads: the temporary copies of images.

    Attributes:
        teaching: the lesson that runs, or ran last; None before the first.
        uploads: as given.
        decoders: of images that the browser sent or a path names; a lesson decodes again by itself what they
            have decoded.
    """

    def __init__(self, folder: Path, request: ModelRequest, uploads: Uploads) -> None:
        self.folder, self.request, self.uploads = folder, request, uploads
        self.decoders = Decoders(_DECODERS)
        self.teaching: Teaching | None = None
        self._current: ServedModel | None = None
        self._seen: tuple[int, int, int] | None = None
        self._loading = threading.RLock()
        self._changing = threading.Lock()
        self._in_use: set[Path] = set()
        uploads.owned_by(lambda: self._in_use)

    # -- the newest state ------------------------------------------------------------------------------------

    def newest(self) -> ServedModel | None:
        """The newest saved state, whoever wrote it; None where there is none yet.

        Raises:
            DualLoRAError: it is damaged, or the folder holds something else.
        """
        from duallora.runtime.compute import Machine
        from duallora.serving.model_watch import ServedModel, signature

        with self._loading:
            found = signature(self.folder)  # comparing a model with the request reads the backbone's file
            if found is not None and found == self._seen:
                return self._current
            manifest = self.request.stored(self.folder)
            if manifest is None:
                self._current = None
            elif self._current is None or self._current.generation != manifest["weights"]:
                self._current = ServedModel.load(self.folder, Machine.of(self.request.device))
            self._seen = found
            return self._current

    def tasks(self) -> list[TaskRecord]:
        """Records of the lessons, forgotten ones left out."""
        model = self.newest()
        return [] if model is None else [task for task in model.learner.tasks if not task.forgotten]

    def classes(self) -> list[str]:
        """What the model knows."""
        model = self.newest()
        return [] if model is None else list(model.learner.classes)

    def unknown_below(self) -> float | None:
        """The familiarity below which an image is unknown by the model's held-back images; None without."""
        return mean_threshold(self.tasks())

    def about(self) -> dict[str, Any] | None:
        """As ``duallora inspect --json``; None where there is no model yet."""
        model = self.newest()
        return None if model is None else model.about

    def run_results(self) -> dict[str, Any] | None:
        """``results.json`` of the run that made the model, while it knows the classes that the run taught."""
        try:
            found = json.loads(read_text(self.folder.resolve().parent / "results.json"))
            taught = [(task["name"], task["classes"]) for task in found["tasks"]]
            matrix = found["accuracy_matrix"]
            square = len(matrix) == len(taught) and all(len(row) == len(taught) for row in matrix)
        except (DualLoRAError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        learned = [(task.name, list(task.classes)) for task in self.tasks()]
        return found if square and learned[: len(taught)] == taught else None

    # -- asking ----------------------------------------------------------------------------------------------

    def model(self) -> ServedModel:
        """As :meth:`newest`.

        Raises:
            DualLoRAError: nothing was learned yet, or the model cannot be read.
        """
        model = self.newest()
        if model is None:
            raise DualLoRAError(NOTHING_LEARNED)
        return model

    def ask(self, paths: Sequence[Path], top: int = 3, unknown_below: float | None = None) -> list[Answer]:
        """What is on each image; while a lesson runs, the state before it answers.

        Raises:
            DualLoRAError: nothing was learned yet, or an image cannot be read.
        """
        model, found = self.model(), list[Answer]()
        for start in range(0, len(paths), EVALUATION_BATCH):
            some = paths[start : start + EVALUATION_BATCH]
            images = [model.preprocess(self.decoders.read(path)) for path in some]
            found += answers(model, images, [path.name for path in some], top, unknown_below)
        return found

    # -- changing --------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a lesson runs."""
        return self.teaching is not None and self.teaching.running

    def teach(
        self,
        check: Check,
        name: str = "",
        files: Iterable[Path] = (),
        learned: Callable[[], None] = lambda: None,
    ) -> Teaching:
        """Starts a lesson in a thread.

        Args:
            check: the classes and their images.
            name: of the lesson; empty makes one from the classes.
            files: all that was given for them. Uploaded copies among them stay until the lesson is over, and
                are deleted then, unless somebody needs them still.
            learned: called in the thread once the lesson is saved, before the copies are deleted.

        Raises:
            DualLoRAError: the classes cannot be learned, the name is taken, or another lesson runs.
        """
        parts = check.divided()
        taken = {task.name for task in self.tasks()}
        name = name.strip()
        if name in taken:
            raise DualLoRAError(f"the model has learned a lesson named “{name}” already; give another name.")
        name = name or lesson_name([each.name for each in check.classes], taken)
        if not self._changing.acquire(blocking=False):
            raise DualLoRAError("the model is being changed; wait until that is done.")

        self._in_use = set(files)

        def after() -> None:
            try:
                if self.teaching is not None and self.teaching.taught is not None:
                    learned()
                files, self._in_use = self._in_use, set()
                self.uploads.discard(files)
            finally:
                self._changing.release()

        self.teaching = Teaching(name, lambda progress: self._learn(parts, name, progress), after)
        try:
            self.teaching.start()
        except BaseException:
            self._in_use = set()
            self._changing.release()
            raise
        return self.teaching

    def stop(self) -> None:
        """Ends the lesson that runs, if one does, at its next step."""
        if self.teaching is not None and self.teaching.running:
            self.teaching.stop()

    def _learn(self, parts: Any, name: str, progress: Watched) -> Taught:
        from duallora.teaching.lesson import Lesson
        from duallora.teaching.training_images import TrainingImages, present

        started = time.monotonic()
        train, held = parts
        images = TrainingImages(train, None if held is None else present(held), (), 0.0)
        lesson = Lesson(self.folder, self.request, images, name, measure_train=True)
        with lesson.taught(progress) as learned:
            taught = outcome(learned, images, time.monotonic() - started)
        with suppress(Exception):  # the lesson is saved; the page says what keeps it from being read
            self.newest()
        return taught

    def forget(self, task: str | None = None, name: str | None = None, purge: bool = False) -> str:
        """Takes a task or a class back, as ``duallora forget``; gives a sentence.

        Raises:
            DualLoRAError: there is none, it is all that the model knows, or the model is being changed.
        """
        from duallora.teaching.take_back import take_back

        with self._change():
            taken = take_back(self.folder, task=task, name=name, purge=purge, device=self.request.device)
        gone = taken.forgotten
        what = ", ".join(gone.classes) or "no class, for other lessons taught them too"
        whole = f", and with it the lesson {quoted(gone.tasks)} as a whole" if gone.tasks else ""
        stays = f"What stays of it: {taken.leaves}."
        end = "The state before is deleted." if purge else "Undo brings it back."
        return f"Forgotten: {what}{whole}. {end} {stays}"

    def step_back(self) -> Step | None:
        """What can be taken back: the last change, or the only lesson as a whole; None for nothing.

        Raises:
            DualLoRAError: the model cannot be read.
        """
        if not (self.folder / "model.json").exists():
            return None
        manifest = checkpoint.read_manifest(self.folder)
        with checkpoint.intact(self.folder):
            return step_back(manifest) or first_lesson(manifest)

    def undo(self, step: Step) -> str:
        """Takes a step back; gives a sentence.

        Raises:
            DualLoRAError: it is not this step any more, or the model is being changed.
        """
        with self._change():
            if step.whole:
                checkpoint.clear(self.folder, step.generation)
            else:
                checkpoint.undo(self.folder, step.generation)
        return step.answer

    def close(self) -> None:
        """Stops a lesson and waits a moment for it."""
        if self.teaching is not None and self.teaching.running:
            self.teaching.stop()
            self.teaching.join(_LAST_STEP)
        self.decoders.close()
        if self.busy:
            self.give_up()

    def give_up(self) -> None:
        """Leaves nothing of a lesson that is still in a step when the process ends.

        Its thread holds the lock, so that nobody else writes there; what it has saved is whole.
        """
        self.decoders.close()
        if self.busy:
            with suppress(OSError):
                checkpoint.remove_leftovers(self.folder)
                if [entry.name for entry in self.folder.iterdir()] == [".lock"]:
                    (self.folder / ".lock").unlink()
                    self.folder.rmdir()

    def _change(self) -> _Changing:
        return _Changing(self._changing)


class _Changing:
    """The right to change the model, taken without waiting."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise DualLoRAError("a lesson is being learned; wait until it is done, or stop it.")

    def __exit__(self, *_: object) -> None:
        self.lock.release()
