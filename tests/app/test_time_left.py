"""How long something still takes."""

from __future__ import annotations

import pytest

from duallora.app.lesson_thread import Watched
from duallora.app.time_left import TimeLeft, in_words


class Clock:
    """Seconds that the test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_follows_from_what_is_done() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.seconds(0.5) is None  # nothing is known in the first moment
    clock.now += 30
    assert left.seconds(0.25) == 90 and left.seconds(0.75) == 10
    assert left.seconds(0.0) is None and left.seconds(1.0) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (3.0, "less than a minute left"),
        (61.0, "about 1 minute left"),
        (200.0, "about 3 minutes left"),
        (5_000.0, "about 83 minutes left"),
        (10_500.0, "about 3 hours left"),
    ],
)
def test_it_is_said_in_minutes(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_a_lesson_counts_its_epochs_together_and_the_look_after_them() -> None:
    clock = Clock()
    watched = Watched(clock)
    for _ in watched.track(range(4), 4, "pets: looking at the images"):
        clock.now += 30
    assert watched.left == ""
    said = []
    for epoch in (1, 2, 3):
        for _ in watched.track(range(2), 2, f"pets: epoch {epoch}/3"):
            said.append(watched.left)
            clock.now += 60
    # Six steps of a minute, and two minutes for a look as long as the first.
    assert said == ["", *(f"about {minutes} minutes left" for minutes in (7, 6, 5, 4, 3))]
    steps = watched.track(range(2), 2, "pets: remembering")
    next(steps)
    clock.now += 90
    next(steps)
    assert watched.left == "about 2 minutes left of this step"
