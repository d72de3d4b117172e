"""The pages of a comparison: ``compare.md``, ``compare.html`` and the curves on them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duallora.predictions import READOUTS
from duallora.runs.comparison import Entry, curves, readouts
from duallora.runs.comparison_tables import Comparison, tables
from duallora.storage.documents import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_PLOT = "compare.png was not drawn: install matplotlib with pip install 'duallora[report]'."
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
_ROOM_NOTE = (
    "Room captured: (line - frozen) / (joint - frozen) of the final accuracy, in percent, with its 95 % "
    "interval; frozen has 0 and joint 100. The room itself, joint - frozen, stands above its column with "
    "its standard deviation; where it is at most twice that, there is no room to capture and no share."
)
_DRAWS_NOTE = (
    "Intervals come from {draws} bootstrap draws. A draw takes test images with replacement, within each "
    "class, and seeds with replacement (n - 1 of n, which makes the variance of their mean right). All lines "
    "get the same images and seeds in a draw. A line with one seed has the spread of the images alone."
)
_PAIRS_NOTE = (
    "Differences of final accuracy are paired, line by line on the same images: points, 95 % interval, and "
    "the two-sided p-value of no difference, corrected for the number of lines in its column (Holm). *As "
    "they predict* takes each line under its own readout."
)
_APART_NOTE = (
    "Some runs are from before answers were kept by image under both readouts: {lines}. Where these lack "
    "them, their images are drawn apart from those of the other lines, which widens the intervals, and no "
    "differences are given; runs made again have both."
)


def markdown(comparison: Comparison, *, plot: bool) -> str:
    """The text of ``compare.md``.

    Args:
        comparison: What it shows.
        plot: Whether ``compare.png`` lies beside it.
    """
    shared = "\n".join(f"- {item}" for item in comparison.protocol)
    parts = ["# Comparison", shared, f"```sh\n{comparison.command}\n```", *_notes(comparison)]
    parts.append("![Accuracy over all classes seen so far](compare.png)" if plot else _NO_PLOT)
    signs = {"best": "**", "second": "*", "": ""}
    for table in tables(comparison):
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


def page(comparison: Comparison, plot: bytes | None) -> str:
    """The text of ``compare.html``: one file with everything in it.

    Args:
        comparison: What it shows.
        plot: The curves as PNG.
    """
    picture = f"<p>{html.escape(_NO_PLOT)}</p>"
    if plot is not None:
        data = base64.b64encode(plot).decode()
        picture = f'<img alt="Accuracy over all classes seen so far" src="data:image/png;base64,{data}">'
    shared = (f"<li>{html.escape(item)}</li>" for item in comparison.protocol)
    body = ["<h1>Comparison</h1>", "<ul>", *shared, "</ul>"]
    body += [
        f"<pre>{html.escape(comparison.command)}</pre>",
        *(f"<p>{_emphasised(note)}</p>" for note in _notes(comparison)),
        picture,
    ]
    for table in tables(comparison):
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


def _notes(comparison: Comparison) -> list[str]:
    """What has to be known to read the tables."""
    evidence = comparison.evidence
    notes = list(_NOTES)
    if evidence.rooms:
        notes.append(_ROOM_NOTE)
    if evidence.lacking:
        notes.append(evidence.lacking)
    if evidence.rooms or evidence.differences:
        notes.append(_DRAWS_NOTE.format(draws=f"{evidence.draws:,}"))
    if evidence.differences:
        notes.append(_PAIRS_NOTE)
    if evidence.apart:
        notes.append(_APART_NOTE.format(lines=", ".join(evidence.apart)))
    return notes


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
