"""One lesson in a thread of its own: what it learns from, how far it is, and what came out of it."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from duallora.app.time_left import Clock, TimeLeft, in_words
from duallora.errors import DualLoRAError
from duallora.runtime.progress import Progress

if TYPE_CHECKING:
    from duallora.outputs import TaskRecord
    from duallora.streams import TaskDataset
    from duallora.teaching.lesson import Learned
    from duallora.teaching.measure import Measured
    from duallora.teaching.training_images import TrainingImages

T = TypeVar("T")
MOST_SHOWN = 24
"""Mistaken images that are shown."""

_EDGE = 160  # pixels of a shown image's longer side
_PART = re.compile(r"(\d+)/(\d+)$")  # of a label: one of so many parts, which all take about as long


class Stopped(DualLoRAError):
    """The user has stopped the lesson; the model is as it was."""


@dataclass(frozen=True)
class Mistaken:
    """A new image that is taken for a class that was known before.

    Attributes:
        name: of the file.
        true: its class.
        found: the old class.
        probability: of the old class.
        held_back: whether it was held back, or learned from.
        picture: a small JPEG as a ``data:`` address.
    """

    name: str
    true: str
    found: str
    probability: float
    held_back: bool
    picture: str


@dataclass(frozen=True)
class Taught:
    """What came of a lesson.

    Attributes:
        record: the task.
        held_back: on the held-back images; None where no class had enough.
        learned_of: class name to images learned from.
        seconds: from the first image to the saved model.
        mistaken: new images taken for old classes, the surest first; at most ``MOST_SHOWN``.
        mistaken_images: how many there are.
        had_old: whether there were old classes to be taken for.
    """

    record: TaskRecord
    held_back: Measured | None
    learned_of: dict[str, int]
    seconds: float
    mistaken: tuple[Mistaken, ...]
    mistaken_images: int
    had_old: bool


class Watched(Progress):
    """Progress that another thread looks at.

    Args:
        clock: seconds that pass.

    Attributes:
        label: what is being done.
        done: steps of it that are behind.
        total: steps of it; 0 while unknown.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__(quiet=True)
        self.label, self.done, self.total = "reading the model", 0, 0
        self.stopping = threading.Event()
        self._clock, self._stage, self._passed = clock, TimeLeft(clock), 0.0

    @property
    def left(self) -> str:
        """How long it still takes, in words; empty while that is not known.

        Epochs are counted together. After them all images are looked at once more, which takes as long as
        the look before them.
        """
        share, part = self.done / max(self.total, 1), _PART.search(self.label)
        if part is None:
            return in_words(self._stage.seconds(share), "this step")
        seconds = self._stage.seconds((int(part[1]) - 1 + share) / int(part[2]))
        return in_words(None if seconds is None else seconds + self._passed)

    def begin(self, label: str) -> None:
        """Names what follows; its length is not known.

        Raises:
            Stopped: the user asked for it.
        """
        if self.stopping.is_set():
            raise Stopped("stopped; the model is as it was.")
        if _PART.sub("", label) != _PART.sub("", self.label):
            self._passed = self._stage.passed if self.total else 0.0
            self._stage = TimeLeft(self._clock)
        self.label, self.done, self.total = label, 0, 0

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yields the items and counts them.

        Raises:
            Stopped: the user asked for it.
        """
        # "birds: epoch 2/4" -> "epoch 2/4"; the name of the lesson stands above.
        self.begin(label.rpartition(": ")[2])
        self.total = total
        for item in items:
            self.begin_step()
            yield item
            self.done += 1

    def begin_step(self) -> None:
        """Ends the lesson here if the user asked for it.

        Raises:
            Stopped: so it is.
        """
        if self.stopping.is_set():
            raise Stopped("stopped; the model is as it was.")


class Teaching:
    """A lesson that runs in a thread.

    Args:
        name: of the lesson, for the page.
        work: does it; whatever it raises is told, never thrown away.
        after: called in the thread when it is over, whatever came of it.

    Attributes:
        progress: how far it is.
        taught: what came of it; None before the end and after a failure.
        error: the sentence that says why it failed.
    """

    def __init__(
        self, name: str, work: Callable[[Watched], Taught], after: Callable[[], None] = lambda: None
    ) -> None:
        self.name, self.progress = name, Watched()
        self.taught: Taught | None = None
        self.error: str | None = None
        self.started = time.monotonic()
        self._work, self._after = work, after
        self._thread = threading.Thread(target=self._run, name="duallora-teach", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends it at the next step, unless it is being saved already; the model is as it was then."""
        self.progress.stopping.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self.taught = self._work(self.progress)
        except DualLoRAError as error:
            self.error = str(error)
        except Exception as error:  # the page has to say something, and the model is as it was
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.error = f"internal error: {text}; the model is as it was."
        finally:
            self._after()


def mistaken_for_old(
    measured: Measured, data: TaskDataset, old: set[str], held_back: bool
) -> list[tuple[int, Mistaken]]:
    """The images of a measurement that are taken for an old class, without their pictures.

    Args:
        measured: on ``data``.
        data: images of the lesson.
        old: classes known before; those taught again are not old.
        held_back: whether these images were held back.
    """
    return [
        (i, Mistaken(data.identifiers[i], true, found, probability, held_back, ""))
        for i, ((true, found), probability) in enumerate(
            zip(measured.answers, measured.confidence, strict=True)
        )
        if found in old and true not in old
    ]


def outcome(learned: Learned, images: TrainingImages, seconds: float) -> Taught:
    """What the page tells of a lesson that was just learned.

    Args:
        learned: what was measured.
        images: learned from, and held back.
        seconds: since the lesson began.
    """
    wrong: list[tuple[TaskDataset, int, Mistaken]] = []
    for data, measured, is_held in (
        (images.train, learned.train, False),
        (images.held_back, learned.held_back, True),
    ):
        if data is not None and measured is not None:
            wrong += [(data, i, each) for i, each in mistaken_for_old(measured, data, learned.old, is_held)]
    wrong.sort(key=lambda each: -each[2].probability)
    shown = tuple(replace(m, picture=thumbnail(data[i][0])) for data, i, m in wrong[:MOST_SHOWN])
    train = images.train
    counts = {name: train.targets.count(t) for t, name in enumerate(train.classes)}
    return Taught(learned.record, learned.held_back, counts, seconds, shown, len(wrong), bool(learned.old))


def thumbnail(image: object) -> str:
    """A small JPEG as a ``data:`` address, which leaves no file behind."""
    from duallora.data.images import to_pil

    small = to_pil(image).copy()  # type: ignore[arg-type]  # what a data set gives
    small.thumbnail((_EDGE, _EDGE))
    if max(small.size) < _EDGE // 2:  # tiny pictures are shown larger, with their pixels
        scale = _EDGE // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
