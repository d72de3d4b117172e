"""The pages of a comparison: ``compare.md``, ``compare.html`` and the curves on them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duallora.predictions import READOUTS
from duallora.runs.comparison import ACCURACIES, COSTS, Entry, Figure, Spread, curves, marks, readouts, spread
from duallora.storage.documents import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_PLOT = "compare.png was not drawn: install matplotlib with pip install 'duallora[report]'."
_MAIN = ("average_incremental_accuracy", "given_task", "forgetting", "forgetting_given_task")
_NOTES = (
    "Mean and sample standard deviation over the seeds; accuracies, forgetting and calibration error in "
    "percent. Bold is best and italic second, marked only where the lead over every line behind exceeds "
    "the larger standard deviation of the two; a line with one seed is never marked, and joint training, "
    "which sees all data at once, takes no part.",
    "*heads*: arg-max over the method's own classifier. *calibrated*: the method's heads joined with the "
    "class rows and calibration of DualLoRA, so that what these bring is not credited to an adapter; the "
    "rows come from the same pass but read more than the final feature, also the mean patch token and "
    "tokens from a third of the depth, by default below the adapters. A method predicts with the readout "
    "named beside it; the columns of the first and the last table that name none are of that one. A "
    "reconstruction follows a paper whose code or full text was not to be had.",
    "Cost: *training* leaves out the frozen features of the un-augmented images, which are computed once "
    "for all runs and which frozen, linear, ncm, color, ranpac without a first session and, outside of "
    "training steps, the queries of the prompt methods are given; *images/s* is measured without them. "
    "*stored* is all that is saved beside the backbone: in every line, also where a method answers by its "
    "heads, that includes the class rows of DualLoRA, whose pooled scatter is in fp64.",
)


@dataclass(frozen=True)
class Table:
    """Cells with their marks: ``"best"``, ``"second"`` or ``""``."""

    title: str
    header: list[str]
    cells: list[list[str]]
    marked: list[list[str]]


def tables(entries: Sequence[Entry]) -> list[Table]:
    """The tables of the pages, in their order."""
    final = ACCURACIES[0]
    columns: list[tuple[Figure, str | None]] = [(final, "heads"), (final, "calibrated")]
    columns += [(figure, None) for figure in ACCURACIES if figure.key in _MAIN]
    first = _table("Accuracy", entries, columns)
    first.header[3:5] = ["final, heads", "final, calibrated"]
    made = [first]
    made += [_table(f"All figures: {r}", entries, [(figure, r) for figure in ACCURACIES]) for r in READOUTS]
    return [*made, _table("Cost", entries, [(figure, None) for figure in COSTS])]


def _table(title: str, entries: Sequence[Entry], columns: Sequence[tuple[Figure, str | None]]) -> Table:
    shown = [e for e in entries if any(r is None or r in readouts(e) for _, r in columns)]
    cells = [[entry.label, entry.readout, _seeds(entry)] for entry in shown]
    marked = [["", "", ""] for _ in shown]
    for figure, readout in columns:
        found = [spread(entry, figure, readout or entry.readout) for entry in shown]
        for row, signs, value, sign in zip(
            cells, marked, found, marks(shown, found, figure.better), strict=True
        ):
            row.append(_cell(figure, value))
            signs.append(sign)
    return Table(
        title, ["method", "predicts with", "seeds", *(figure.title for figure, _ in columns)], cells, marked
    )


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


def _seeds(entry: Entry) -> str:
    return ", ".join(map(str, entry.seeds))


def markdown(entries: Sequence[Entry], protocol: Sequence[str], command: str, *, plot: bool) -> str:
    """The text of ``compare.md``.

    Args:
        entries: The lines, in the order of the tables.
        protocol: What all runs have in common, one sentence each.
        command: That made the page.
        plot: Whether ``compare.png`` lies beside it.
    """
    parts = ["# Comparison", "\n".join(f"- {item}" for item in protocol), f"```sh\n{command}\n```", *_NOTES]
    parts.append("![Accuracy over all classes seen so far](compare.png)" if plot else _NO_PLOT)
    signs = {"best": "**", "second": "*", "": ""}
    for table in tables(entries):
        lines = [
            [f"{signs[m]}{cell}{signs[m]}" for cell, m in zip(row, found, strict=True)]
            for row, found in zip(table.cells, table.marked, strict=True)
        ]
        parts += [f"## {table.title}", markdown_table(table.header, lines)]
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { border-bottom: 2px solid #888; }
.best { font-weight: 700; } .second { font-style: italic; }
img { max-width: 100%; background: #fff; } pre { overflow-x: auto; padding: .6rem; background: #8882; }
"""


def page(entries: Sequence[Entry], protocol: Sequence[str], command: str, plot: bytes | None) -> str:
    """The text of ``compare.html``: one file with everything in it.

    Args:
        entries: The lines, in the order of the tables.
        protocol: What all runs have in common.
        command: That made the page.
        plot: The curves as PNG.
    """
    picture = f"<p>{html.escape(_NO_PLOT)}</p>"
    if plot is not None:
        data = base64.b64encode(plot).decode()
        picture = f'<img alt="Accuracy over all classes seen so far" src="data:image/png;base64,{data}">'
    body = ["<h1>Comparison</h1>", "<ul>", *(f"<li>{html.escape(item)}</li>" for item in protocol), "</ul>"]
    body += [
        f"<pre>{html.escape(command)}</pre>",
        *(f"<p>{_emphasised(note)}</p>" for note in _NOTES),
        picture,
    ]
    for table in tables(entries):
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
        body += [
            f"<h2>{html.escape(table.title)}</h2>",
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>',
        ]
        body.append("<tbody>")
        for row, found in zip(table.cells, table.marked, strict=True):
            first = f'<th scope="row">{html.escape(row[0])}</th>'
            rest = (
                f'<td class="{mark}">{html.escape(cell)}</td>' if mark else f"<td>{html.escape(cell)}</td>"
                for cell, mark in zip(row[1:], found[1:], strict=True)
            )
            body.append(f"<tr>{first}{''.join(rest)}</tr>")
        body.append("</tbody></table></div>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _emphasised(note: str) -> str:
    """A note with its ``*words*`` in italics."""
    parts = html.escape(note).split("*")
    return "".join(f"<em>{part}</em>" if i % 2 else part for i, part in enumerate(parts))


def plot(entries: Sequence[Entry]) -> bytes | None:
    """``compare.png``: curves with bands of one standard deviation; None without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return None
    canvas = Canvas(figsize=(15, 7), layout="constrained")
    FigureCanvasAgg(canvas)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    styles, tasks = ("-", "--", ":"), max(len(entry.runs[0]["tasks"]) for entry in entries)
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, readout in zip(panels, READOUTS, strict=True):
        for place, entry in enumerate(entries):  # so that a line looks the same in both panels
            if readout in readouts(entry):
                look = {"color": colours[place % 20], "ls": styles[(place // 20 + place % 2) % 3]}
                _draw(axes, entry, readout, tasks, look)
        axes.set(xlabel="tasks learned", title=f"accuracy over all classes seen so far: {readout}")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right center")
    data = io.BytesIO()
    canvas.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _draw(axes: Axes, entry: Entry, readout: str, tasks: int, look: dict[str, Any]) -> None:
    points = curves(entry, readout)
    steps, found = list(points), list(points.values())
    means = [value.mean for value in found]
    label = entry.label.replace("$", r"\$")  # matplotlib would read a formula
    if entry.upper_bound:  # it has learned nothing but the end
        axes.plot([tasks], means[-1:], label=label, color="0.2", ls="", marker="*", ms=11)
        return
    axes.plot(steps, means, label=label, lw=1.6, **look)
    if len(entry.seeds) > 1:
        low, high = ([v.mean + sign * (v.deviation or 0.0) for v in found] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.2, lw=0)
