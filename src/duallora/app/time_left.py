"""How long something still takes, estimated from the steps that are done, and said in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
_SURE = 2.0  # seconds; the first steps also start processes and fill caches


class TimeLeft:
    """Counts from now on.

    Args:
        clock: seconds that pass.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock, self.started = clock, clock()

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.started

    def seconds(self, share: float) -> float | None:
        """Seconds that are left if all steps take as long; None while that is not known, and at the end.

        Args:
            share: of the steps that are done, from 0 to 1.
        """
        passed = self.passed
        return passed * (1 - share) / share if 0 < share < 1 and passed >= _SURE else None


def in_words(seconds: float | None, of: str = "") -> str:
    """``about 3 minutes left``; empty for None.

    Args:
        seconds: that are left.
        of: what they are left of, where it is not the whole.
    """
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 60:
        told = "less than a minute"
    elif minutes < 90:
        told = f"about {minutes} {'minute' if minutes == 1 else 'minutes'}"
    else:
        told = f"about {round(seconds / 3600)} hours"
    return f"{told} left{of and f' of {of}'}"
