"""Progress: bars on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")
_SILENCE = 30.0  # seconds without a line before a long loop says where it is, when there is no terminal


class Figures(Protocol):
    """Whoever wants figures of a training while it goes on."""

    def take(self, figures: Mapping[str, float], step: int) -> None:
        """Takes figures by name.

        Args:
            figures: finite or not.
            step: optimiser steps that are behind; never fewer than before.
        """


class Progress:
    """Tells a person what is going on.

    Args:
        console: where to write; the default is stderr.
        quiet: say nothing at all.
        figures: gets what is recorded; without it that goes nowhere.

    Attributes:
        steps: optimiser steps recorded so far.
    """

    def __init__(
        self, console: Console | None = None, quiet: bool = False, figures: Figures | None = None
    ) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.quiet = quiet
        self.figures = figures
        self.steps = 0

    @property
    def recording(self) -> bool:
        """Whether anybody wants figures; what costs something is computed only then."""
        return self.figures is not None

    def record(self, figures: Mapping[str, float], *, steps: int = 0) -> None:
        """Passes figures on.

        Args:
            figures: by name.
            steps: optimiser steps since the last call.
        """
        self.steps += steps
        if self.figures is not None:
            self.figures.take(figures, self.steps)

    def line(self, text: str) -> None:
        """Writes one line."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, label: str) -> None:
        """Names what is done next, of unknown length; said only by those who show one thing at a time."""

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yields the items with a bar (terminal) or a line every half minute (elsewhere)."""
        if self.quiet:
            yield from items
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Bars(*columns, console=self.console, transient=True) as bars:
                yield from bars.track(items, total=total, description=label)
        else:
            said = time.monotonic()
            for done, item in enumerate(items):
                if time.monotonic() - said > _SILENCE:
                    self.line(f"{label}: {done} of {total}")
                    said = time.monotonic()
                yield item
