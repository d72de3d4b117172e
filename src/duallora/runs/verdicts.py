"""What was published beside what is measured, and whether the two agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duallora.runs.comparison import Entry, Results, Spread
from duallora.runs.comparison_tables import Table, unmarked

FIGURES = {
    "final_accuracy": "final accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
}
NONE_PUBLISHED = "no published figure"


@dataclass(frozen=True)
class Verdict:
    """One figure of one line, under the method's own readout; shares in [0, 1].

    Attributes:
        line: Its name.
        figure: One of `FIGURES`.
        measured: Mean and sample standard deviation over the seeds.
        seeds: So many.
        published: The figure; None where none is known.
        tolerance: How far the mean may be from it.
        source: Of the figure.
    """

    line: str
    figure: str
    measured: Spread
    seeds: int
    published: float | None
    tolerance: float | None
    source: str | None

    @property
    def inside(self) -> bool | None:
        """Whether the measured mean lies within the tolerance; None where nothing is published."""
        if self.published is None or self.tolerance is None:
            return None
        return abs(self.measured.mean - self.published) <= self.tolerance

    @property
    def words(self) -> str:
        """The verdict for a table."""
        if self.inside is None or self.tolerance is None:
            return NONE_PUBLISHED
        return f"{'inside' if self.inside else 'outside'} ± {100 * self.tolerance:.1f}"

    def document(self) -> dict[str, Any]:
        """As ``compare.json`` holds it."""
        return {
            "line": self.line,
            "figure": self.figure,
            "published": self.published,
            "tolerance": self.tolerance,
            "measured": self.measured.mean,
            "deviation": self.measured.deviation,
            "seeds": self.seeds,
            "inside": self.inside,
            "source": self.source,
        }


def judge(line: str, runs: Sequence[Results], expected: Mapping[str, Any]) -> list[Verdict]:
    """A verdict on every figure of a line.

    Args:
        line: Its name.
        runs: Contents of the ``results.json`` of its seeds.
        expected: Published figures by their key, ``tolerance`` and ``source``; empty where none is known.
    """
    found = []
    for figure in FIGURES:
        values = [run[figure] for run in runs]
        measured = Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
        published = expected.get(figure)
        known = published is not None
        found.append(
            Verdict(
                line,
                figure,
                measured,
                len(runs),
                published,
                expected["tolerance"] if known else None,
                expected["source"] if known else None,
            )
        )
    return found


def shown(measured: Spread) -> str:
    """A measured figure in percent, with its spread where there is one."""
    spread = "" if measured.deviation is None else f" ± {100 * measured.deviation:.2f}"
    return f"{100 * measured.mean:.2f}{spread}"


def verdict_table(entries: Sequence[Entry], verdicts: Mapping[str, Sequence[Verdict]]) -> Table:
    """One line of a comparison a row: published, measured and verdict, for both figures.

    Args:
        entries: The lines.
        verdicts: By line, as `judge` gives them.
    """
    header = ["method", "seeds"]
    for title in ("final", "average"):
        header += [f"{title}: published", "measured", "verdict"]
    cells = []
    for entry in entries:
        row = [entry.label, ", ".join(map(str, entry.seeds))]
        for verdict in verdicts[entry.name]:
            published = "-" if verdict.published is None else f"{100 * verdict.published:.2f}"
            row += [published, shown(verdict.measured), verdict.words]
        cells.append([*row, verdicts[entry.name][0].source or "-"])
    return unmarked("Published and measured", [*header, "source"], cells)
