"""A comparison as numbers: ``compare.csv`` and ``compare.json``."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from typing import Any

from duallora.predictions import READOUTS
from duallora.runs.comparison import ACCURACIES, COSTS, Entry, Figure, readouts, spread
from duallora.runs.comparison_tables import Comparison
from duallora.runs.room import OWN, Evidence
from duallora.storage.documents import finite

VERSION = 1
_ROOM_COLUMNS = ("room_captured", "room_captured_low", "room_captured_high")


def to_csv(entries: Sequence[Entry], evidence: Evidence) -> bytes:
    """One row a line and readout: mean and standard deviation of every figure; shares, MB and seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [*ACCURACIES, *COSTS]
    columns = [f"{figure.key}{part}" for figure in figures for part in ("", "_sd")]
    about = ["line", "method", "reconstruction", "readout", "own_readout", "seeds"]
    writer.writerow([*about, *columns, *_ROOM_COLUMNS])
    for entry in entries:
        for readout in readouts(entry):
            numbers: list[float | None] = []
            for figure in figures:
                numbers += spread(entry, figure, readout) or (None, None)
            captured = evidence.captured.get((entry.name, readout))
            numbers += (None, None, None) if captured is None else (captured.share, *captured.interval)
            told = [entry.name, entry.method, str(entry.reconstruction).lower(), readout]
            told += [str(readout == entry.readout).lower(), " ".join(map(str, entry.seeds))]
            writer.writerow([*told, *("" if x is None else f"{x:.6g}" for x in numbers)])
    return text.getvalue().encode()


def to_json(comparison: Comparison, **more: Any) -> bytes:
    """All of a comparison in one document; shares in [0, 1], seconds and MB.

    Args:
        comparison: What the pages show.
        more: Further entries of the document.
    """
    entries, evidence = comparison.entries, comparison.evidence
    content = {
        "version": VERSION,
        "command": comparison.command,
        "protocol": list(comparison.protocol),
        "reference": comparison.reference,
        "draws": evidence.draws,
        "rooms": {
            name: {"size": room.size, "deviation": room.deviation, "there": room.there}
            for name, room in evidence.rooms.items()
        },
        "rooms_lacking": evidence.lacking or None,
        "lines": [_line(entry, evidence) for entry in entries],
        "differences": [
            {"line": one.name, "other": other.name, "readout": kind, "mean": found.mean, "p": found.p}
            | found.interval._asdict()
            for one, other in itertools.combinations(entries, 2)
            for kind in (OWN, *READOUTS)
            if (found := evidence.differences.get((one.name, other.name, kind))) is not None
        ],
        **more,
    }
    return (json.dumps(finite(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _line(entry: Entry, evidence: Evidence) -> dict[str, Any]:
    return {
        "name": entry.name,
        "method": entry.method,
        "reconstruction": entry.reconstruction,
        "upper_bound": entry.upper_bound,
        "readout": entry.readout,
        "seeds": list(entry.seeds),
        "answers_by_image": entry.name not in evidence.apart,
        "cost": {figure.key: _spread(entry, figure, entry.readout) for figure in COSTS},
        "readouts": {
            readout: {figure.key: _spread(entry, figure, readout) for figure in ACCURACIES}
            | {"room_captured": _captured(entry, readout, evidence)}
            for readout in readouts(entry)
        },
    }


def _spread(entry: Entry, figure: Figure, readout: str) -> dict[str, float | None] | None:
    value = spread(entry, figure, readout)
    return None if value is None else value._asdict()


def _captured(entry: Entry, readout: str, evidence: Evidence) -> dict[str, float] | None:
    found = evidence.captured.get((entry.name, readout))
    return None if found is None else {"share": found.share, **found.interval._asdict()}
