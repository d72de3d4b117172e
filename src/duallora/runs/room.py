"""What a comparison shows beyond means: the share of the room that a line captures, and paired differences.

The room is what training on all data at once brings over the frozen backbone. Where it is no larger than
twice its own spread, a share of it means nothing, and none is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from duallora.predictions import READOUTS
from duallora.runs.comparison import ACCURACIES, Entry, readouts, spread
from duallora.runs.resampling import Draws, Interval, interval, p_value, resample

OWN = "own"
"""In place of a readout: each line as it predicts."""


class Room(NamedTuple):
    """(joint - frozen) of final accuracy under one readout.

    Attributes:
        size: Of the room, a difference of shares.
        deviation: Standard deviation of ``size`` over the draws.
    """

    size: float
    deviation: float

    @property
    def there(self) -> bool:
        """Whether the room is larger than twice its spread."""
        return self.size > 2 * self.deviation


class Captured(NamedTuple):
    """(line - frozen) / (joint - frozen), and its 95 % interval."""

    share: float
    interval: Interval


class Difference(NamedTuple):
    """Final accuracy of one line less another's, its 95 % interval, and the p-value of no difference."""

    mean: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class Evidence:
    """What the lines of a comparison show.

    Attributes:
        rooms: By readout; no entry where frozen or joint is missing or does not have it.
        captured: By line and readout; no entry where there is no room, or where the line stands on another
            backbone than frozen and joint.
        differences: By line, other line and readout (or `OWN`), both orders; no entry where two lines were
            not tested on the same images or stand on different backbones.
        lacking: Why there is no room at all, in a sentence with the remedy; empty where there is one.
        apart: Lines that have runs without answers by image under some readout.
        draws: Number of draws.
    """

    rooms: Mapping[str, Room]
    captured: Mapping[tuple[str, str], Captured]
    differences: Mapping[tuple[str, str, str], Difference]
    lacking: str
    apart: tuple[str, ...]
    draws: int


def find_evidence(entries: Sequence[Entry]) -> Evidence:
    """Draws seeds and images for all lines, and reads off what they show.

    Raises:
        DualLoRAError: The answers of a run contradict its accuracies.
    """
    draws = resample(entries)
    frozen, joint = (_bound(entries, method) for method in ("frozen", "joint"))
    rooms: dict[str, Room] = {}
    captured: dict[tuple[str, str], Captured] = {}
    lacking = _lacking(frozen, joint)
    if frozen is not None and joint is not None and not lacking:
        for readout in READOUTS:
            if readout in readouts(frozen) and readout in readouts(joint):
                rooms[readout] = _room(frozen, joint, readout, draws)
                if rooms[readout].there:
                    captured |= _captured(entries, frozen, joint, readout, draws)
    return Evidence(
        rooms,
        captured,
        _differences(entries, draws),
        lacking,
        tuple(dict.fromkeys(name for (name, _), images in draws.images.items() if images is None)),
        len(next(iter(draws.accuracies.values()))),
    )


def default_reference(entries: Sequence[Entry]) -> str:
    """The line that the others are shown beside: ``duallora``, else the first one that sees tasks one by one.

    Args:
        entries: The lines, in the order of the page.
    """
    names = [entry.name for entry in entries if not entry.upper_bound]
    return "duallora" if "duallora" in names else (names or [entries[0].name])[0]


def _bound(entries: Sequence[Entry], method: str) -> Entry | None:
    """The line of that name, else the only one of that method."""
    found = [entry for entry in entries if entry.method == method]
    named = [entry for entry in found if entry.name == method] or found
    return named[0] if len(named) == 1 else None


def _lacking(frozen: Entry | None, joint: Entry | None) -> str:
    if frozen is not None and joint is not None:
        if _backbone(frozen) == _backbone(joint):
            return ""
        return "Room captured is not given: frozen and joint stand on different backbones; run both on one."
    absent = [name for name, entry in (("frozen", frozen), ("joint", joint)) if entry is None]
    return (
        f"Room captured is not given without the line{'s' * (len(absent) - 1)} {' and '.join(absent)}: add "
        f"{','.join(absent)} to --methods and repeat the command, which runs only what is missing."
    )


def _backbone(entry: Entry) -> tuple[str, ...]:
    """What tells one backbone from another; how images are cropped for it is no part of it."""
    info = entry.runs[0].get("backbone", {})
    return tuple(str(info.get(key)) for key in ("sha256", "input_size", "mean", "std"))


def _mean(entry: Entry, readout: str) -> float:
    value = spread(entry, ACCURACIES[0], readout)
    return 0.0 if value is None else value.mean


def _room(frozen: Entry, joint: Entry, readout: str, draws: Draws) -> Room:
    drawn = draws.accuracies[joint.name, readout] - draws.accuracies[frozen.name, readout]
    return Room(_mean(joint, readout) - _mean(frozen, readout), float(drawn.std()))


def _captured(
    entries: Sequence[Entry], frozen: Entry, joint: Entry, readout: str, draws: Draws
) -> dict[tuple[str, str], Captured]:
    """Of every line but the two that the room lies between."""
    floor, found = draws.accuracies[frozen.name, readout], {}
    room = draws.accuracies[joint.name, readout] - floor
    size = _mean(joint, readout) - _mean(frozen, readout)
    for entry in entries:
        bound = entry.name in (frozen.name, joint.name)
        if bound or readout not in readouts(entry) or _backbone(entry) != _backbone(frozen):
            continue
        share = (_mean(entry, readout) - _mean(frozen, readout)) / size
        drawn = (draws.accuracies[entry.name, readout] - floor) / room
        # A draw without any room has no share; there are few of them, as the room is twice its spread.
        found[entry.name, readout] = Captured(share, interval(drawn[room != 0]))
    return found


def _differences(entries: Sequence[Entry], draws: Draws) -> dict[tuple[str, str, str], Difference]:
    found = {}
    for one, other in itertools.permutations(entries, 2):
        if _backbone(one) != _backbone(other):
            continue
        shared = [readout for readout in readouts(one) if readout in readouts(other)]
        for kind in (*shared, OWN):
            mine, theirs = (entry.readout if kind == OWN else kind for entry in (one, other))
            if not draws.paired((one.name, mine), (other.name, theirs)):
                continue
            drawn = draws.accuracies[one.name, mine] - draws.accuracies[other.name, theirs]
            mean = _mean(one, mine) - _mean(other, theirs)
            found[one.name, other.name, kind] = Difference(mean, interval(drawn), p_value(drawn))
    return found
