"""What a handler shows while something is going on: a bar, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from duallora.app import html
from duallora.app.lesson_thread import Teaching
from duallora.app.time_left import TimeLeft, in_words

S = TypeVar("S")
T = TypeVar("T")
Steps = Generator[tuple[int, int], None, T]
"""Work that yields how many steps are done and how many there are, and returns what came of it."""

_POLL = 0.25  # seconds between two looks


@dataclass(frozen=True)
class Moment:
    """A lesson as it runs, as HTML.

    Attributes:
        bar: how far it is.
        stage: what is being done, where it is something else than before; else None.
    """

    bar: str
    stage: str | None


def moments(teaching: Teaching) -> Iterator[Moment]:
    """Looks at a lesson until it is over."""
    last = None
    while teaching.running:
        progress = teaching.progress
        told = f"{teaching.name}: {progress.label}"
        bar = html.progress(told, progress.done, progress.total, progress.left)
        yield Moment(bar, html.paragraph(told) if told != last else None)
        last = told
        time.sleep(_POLL)


def watched(steps: Steps[T], label: str, shown: Callable[[str], S]) -> Generator[S, None, T]:
    """Does some work, and shows now and then how far it is.

    Args:
        steps: the work.
        label: what it is called.
        shown: what the handler yields for a bar.

    Returns:
        What came of the work.
    """
    left, next_look = TimeLeft(), 0.0
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if left.passed >= next_look:
            yield shown(html.progress(label, done, total, in_words(left.seconds(done / max(total, 1)))))
            next_look = left.passed + _POLL
