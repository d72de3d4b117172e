"""The tables of a comparison: cells as they are shown, and which of them lead by more than the spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duallora.predictions import READOUTS
from duallora.runs.comparison import ACCURACIES, COSTS, Entry, Figure, Spread, marks, readouts, spread
from duallora.runs.resampling import Interval, holm
from duallora.runs.room import OWN, Captured, Difference, Evidence

NO_ROOM = "no room"
_MAIN = ("average_incremental_accuracy", "given_task", "forgetting", "forgetting_given_task")
_BESIDE_ROOM = ("training_seconds", "stored_mb", "forward_passes")
_ABOUT = ["method", "predicts with", "seeds"]


@dataclass(frozen=True)
class Table:
    """Cells with their marks: ``"best"``, ``"second"`` or ``""``."""

    title: str
    header: list[str]
    cells: list[list[str]]
    marked: list[list[str]]


@dataclass(frozen=True)
class Comparison:
    """What the pages of a comparison show.

    Attributes:
        entries: The lines, in the order of the tables.
        evidence: What they show beyond means.
        reference: The line that the others are shown beside.
        protocol: What all runs have in common, one sentence each.
        command: That made the pages.
        first: Tables that come before those that every comparison has.
    """

    entries: Sequence[Entry]
    evidence: Evidence
    reference: str
    protocol: Sequence[str]
    command: str
    first: Sequence[Table] = ()


def unmarked(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table in which nothing leads."""
    return Table(title, list(header), [list(row) for row in cells], [["" for _ in row] for row in cells])


def tables(comparison: Comparison) -> list[Table]:
    """The tables of the pages, in their order; those of room and of pairs only where there are any."""
    entries, evidence, reference = comparison.entries, comparison.evidence, comparison.reference
    final = ACCURACIES[0]
    columns: list[tuple[Figure, str | None]] = [(final, "heads"), (final, "calibrated")]
    columns += [(figure, None) for figure in ACCURACIES if figure.key in _MAIN]
    first = _table("Accuracy", entries, columns)
    first.header[3:5] = ["final, heads", "final, calibrated"]
    made = [*comparison.first, first]
    if evidence.rooms:
        made.append(_room_table(entries, evidence))
    if any(other == reference for _, other, _ in evidence.differences):
        made.append(_difference_table(entries, evidence, reference))
    made += [_table(f"All figures: {r}", entries, [(figure, r) for figure in ACCURACIES]) for r in READOUTS]
    return [*made, _table("Cost", entries, [(figure, None) for figure in COSTS])]


def _table(title: str, entries: Sequence[Entry], columns: Sequence[tuple[Figure, str | None]]) -> Table:
    shown = [e for e in entries if any(r is None or r in readouts(e) for _, r in columns)]
    cells = [_about(entry) for entry in shown]
    marked = [["", "", ""] for _ in shown]
    for figure, readout in columns:
        found = [spread(entry, figure, readout or entry.readout) for entry in shown]
        for row, signs, value, sign in zip(
            cells, marked, found, marks(shown, found, figure.better), strict=True
        ):
            row.append(_cell(figure, value))
            signs.append(sign)
    return Table(title, [*_ABOUT, *(figure.title for figure, _ in columns)], cells, marked)


def _room_table(entries: Sequence[Entry], evidence: Evidence) -> Table:
    """Room captured under both readouts, and beside it what the line costs."""
    costs = [figure for figure in COSTS if figure.key in _BESIDE_ROOM]
    header = list(_ABOUT)
    for readout in READOUTS:
        room = evidence.rooms.get(readout)
        told = "" if room is None else f" (room {100 * room.size:.1f} ± {100 * room.deviation:.1f})"
        header.append(f"{readout}{told}")
    cells = [
        [
            *_about(entry),
            *(_captured(entry, readout, evidence) for readout in READOUTS),
            *(_cell(figure, spread(entry, figure, entry.readout)) for figure in costs),
        ]
        for entry in entries
    ]
    return unmarked("Room captured", [*header, *(figure.title for figure in costs)], cells)


def _captured(entry: Entry, readout: str, evidence: Evidence) -> str:
    room, found = evidence.rooms.get(readout), evidence.captured.get((entry.name, readout))
    if room is None or readout not in readouts(entry):
        return "-"
    if not room.there:
        return NO_ROOM
    return "-" if found is None else _share(found)


def _share(found: Captured) -> str:
    return f"{100 * found.share:.0f} ({_range(found.interval, 0)})"


def _range(interval: Interval, digits: int) -> str:
    return f"{100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f}"


def _difference_table(entries: Sequence[Entry], evidence: Evidence, reference: str) -> Table:
    """Every line less the reference on the same images: as both predict, and under either readout."""
    shown = [entry for entry in entries if entry.name != reference]
    cells = [_about(entry) for entry in shown]
    for kind in (OWN, *READOUTS):
        found = [evidence.differences.get((entry.name, reference, kind)) for entry in shown]
        adjusted = iter(holm([difference.p for difference in found if difference is not None]))
        for row, difference in zip(cells, found, strict=True):
            row.append("-" if difference is None else _difference(difference, next(adjusted)))
    header = [*_ABOUT, "as they predict", *READOUTS]
    return unmarked(f"Final accuracy less that of {reference}", header, cells)


def _difference(found: Difference, p: float) -> str:
    return f"{100 * found.mean:+.1f} ({_range(found.interval, 1)}), p {p:.2g}"


def _cell(figure: Figure, value: Spread | None) -> str:
    if value is None:
        return "-"
    scale, digits = (100, 1) if figure in ACCURACIES else (1, 0 if figure.key != "stored_mb" else 1)
    if figure.key == "trainable_mb":
        digits = 2
    shown = f"{scale * value.mean:.{digits}f}"
    if value.deviation is None or figure.key == "forward_passes":
        return shown
    return f"{shown} ± {scale * value.deviation:.{digits}f}"


def _about(entry: Entry) -> list[str]:
    return [entry.label, entry.readout, ", ".join(map(str, entry.seeds))]
