"""What a measurement writes: tables of ratios, ``bench.json``, ``bench.csv`` and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from duallora.storage.documents import finite

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of a printed table."""

    head: str
    cell: Callable[[Row], str]


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(key)
        return "-" if value is None else format(value if scale == 1 else scale * value, form)

    return cell


PREDICTION = (
    Column("method", lambda row: str(row["method"])),
    Column("tasks", _number("tasks", "d")),
    Column("batch", _number("batch", "d")),
    Column("images/s", _number("images_per_second", ".1f")),
    Column("ms a batch", _number("prediction_seconds", ".2f", 1e3)),
    Column("time x backbone", _number("prediction_ratio", ".3f")),
    Column("FLOPs x backbone", _number("flops_ratio", ".3f")),
    Column("passes", _number("forward_passes", ".0f")),
    Column("peak MB", _number("prediction_peak_bytes", ".1f", 1e-6)),
    Column("stored MB", _number("stored_bytes", ".2f", 1e-6)),
)
"""Columns of the table of predictions, one line a row."""

TRAINING = (
    Column("method", lambda row: str(row["method"])),
    Column("tasks", _number("tasks", "d")),
    Column("ms a step", _number("training_seconds", ".2f", 1e3)),
    Column("time x lora", _number("training_ratio", ".3f")),
    Column("FLOPs x lora", _number("training_flops_ratio", ".3f")),
    Column("peak MB", _number("training_peak_bytes", ".1f", 1e-6)),
    Column("peak x lora", _number("training_peak_ratio", ".3f")),
    Column("data passes", _number("data_passes", "d")),
    Column("s before", _number("prepare_seconds", ".2f")),
    Column("s after", _number("consolidate_seconds", ".2f")),
    Column("% of 20 epochs", _number("passes_share", ".1f", 100)),
    Column("MB a task", _number("stored_bytes_per_task", ".3f", 1e-6)),
)
"""Columns of the table of training, one line a method and number of tasks."""


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The cells of a table."""
    return [[column.cell(row) for column in columns] for row in rows]


def trained(rows: Sequence[Row]) -> list[Row]:
    """One row a method and number of tasks, of those whose training was measured."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        if "prepare_seconds" in row:
            found.setdefault((row["method"], row["tasks"]), row)
    return list(found.values())


def to_json(rows: Sequence[Row], environment: Mapping[str, Any], more: Mapping[str, Any]) -> bytes:
    """``bench.json``."""
    content = {"rows": list(rows), "environment": environment, **more}
    return (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode()


def to_csv(rows: Sequence[Row]) -> bytes:
    """``bench.csv``: one line a row, columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(column) for column in columns)
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return text.getvalue().encode()


def plot(rows: Sequence[Row]) -> bytes | None:
    """``bench.png``: both ratios over the number of tasks; None without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    largest = max(row["batch"] for row in rows)
    panels = (
        (left, "prediction_ratio", [row for row in rows if row["batch"] == largest]),
        (right, "training_ratio", trained(rows)),
    )
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axes, ratio, shown in panels:
        for place, name in enumerate(names):
            points = [(row["tasks"], row[ratio]) for row in shown if row["method"] == name and row.get(ratio)]
            if points:
                style = ("-", "--")[place // 20 % 2]
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", ms=3, color=colours[place % 20], label=name
                )
        axes.set(xlabel="tasks learned")
        axes.grid(alpha=0.3)
    left.set(title=f"prediction, batch {largest}", ylabel="time over that of the bare backbone")
    right.set(title="training step", ylabel="time over that of plain LoRA")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
