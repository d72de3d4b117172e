"""What a finished run shows: ``report.md``, ``accuracy.png``, ``predictions.csv`` and the terminal's table.

All but the predictions are made from the contents of ``results.json`` alone, so that a report can be made
again from a results file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from duallora.storage.documents import escape_cell, markdown_table, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_HINT = "accuracy.png was not drawn: install matplotlib with pip install 'duallora[report]'"

_MOST_TASKS = 20  # with more, the accuracies by task are in results.json, and the report has their means
_NAMED_COLUMNS = 6  # wider tables number their columns, so that ten tasks fit 80 characters

_CURVE_HEADER = ("after", "all seen", "given the task, mean over tasks")

_FIGURES = (
    ("final_accuracy", "Final accuracy, all seen test images"),
    ("final_row_accuracy", "Final accuracy, class and task right"),
    ("final_accuracy_task_mean", "Final accuracy, mean over tasks"),
    ("average_incremental_accuracy", "Average incremental accuracy"),
    ("forgetting", "Forgetting"),
    ("forgetting_given_task", "Forgetting, given the true task"),
    ("backward_transfer", "Backward transfer"),
    ("task_identity_accuracy", "Task identity, task of the largest row"),
    ("calibration_error", "Calibration error, 15 bins"),
)


def accuracy_table(results: dict[str, Any]) -> Table:
    """The accuracy matrix for a terminal: row = after a task, column = test images of a task, in percent."""
    table = Table(title=f"Accuracy in percent ({results['readout']})", title_justify="left")
    if len(results["tasks"]) > _MOST_TASKS:
        for head in _CURVE_HEADER:
            table.add_column(head, justify="left" if head == _CURVE_HEADER[0] else "right")
        for cells in _curve(results):
            table.add_row(*map(escape, cells))
        return table
    names = [task["name"] for task in results["tasks"]]
    table.add_column("after")
    for number, name in enumerate(names, start=1):
        wide = len(names) > _NAMED_COLUMNS
        table.add_column(str(number) if wide else escape(name), justify="right")
    table.add_column("all seen", justify="right", style="bold")
    seen = results["readouts"][results["readout"]]["incremental_accuracy"]
    for name, row, total in zip(names, results["accuracy_matrix"], seen, strict=True):
        shares = ("" if cell is None else percent(cell) for cell in (*row, total))
        table.add_row(escape(name), *shares)
    return table


def markdown(results: dict[str, Any], *, plot: bool) -> str:
    """The text of ``report.md``.

    Args:
        results: The contents of ``results.json``.
        plot: Whether ``accuracy.png`` lies beside it.
    """
    stream, backbone = results["stream"], results["backbone"]
    names = [task["name"] for task in results["tasks"]]
    by_task = [
        f"Row: after learning that task. Column: test images of the task. Readout: {results['readout']}.",
        _matrix(names, results["accuracy_matrix"]),
        "## The same, given the true task",
        "Probabilities restricted to the classes of the true task; the network itself is not told the task.",
        _matrix(names, results["oracle_accuracy_matrix"]),
    ]
    over_tasks = [
        f"All test images seen so far. Readout: {results['readout']}; the accuracies by task are in "
        "`results.json`. Given the task: probabilities restricted to the classes of the true task.",
        markdown_table(list(_CURVE_HEADER), _curve(results)),
    ]
    picture = "![Accuracy after every task](accuracy.png)" if plot else PLOT_HINT + "."
    parts = [
        f"# Run on {escape_cell(stream['name'])}",
        f"{len(names)} tasks, {len(stream['class_order'])} classes, class order {stream['order_seed']}; "
        f"backbone `{backbone['name']}` (sha256 `{backbone['sha256'][:12]}`). The method's own readout is "
        f"**{results['readout']}**. All accuracies in percent, without task labels unless said.",
        "## Figures",
        _figures(results),
        picture,
        "## Accuracy after every task",
        *(over_tasks if len(names) > _MOST_TASKS else by_task),
        "## Tasks",
        _tasks(results),
        "Norms: of the task's update, divided by that of the frozen weights, mean over adapted layers. Own "
        "gate: mean weight of the task's own residual on its own test images. Drift: relative change of the "
        "final features of the task's test images from right after it was learned to the end.",
        "## Cost",
        _cost(results),
        "## Configuration",
        _listing(results["config"]),
        "## Environment",
        _listing(results["environment"]),
    ]
    return "\n\n".join(parts) + "\n"


def predictions_csv(
    classes: Sequence[str], batches: Iterable[tuple[Sequence[str], Sequence[str], str, Tensor]]
) -> bytes:
    """The contents of ``predictions.csv``: one line a test image, one column a class.

    The column of a class is called ``probability:`` and its name, for a class may be called ``image``.

    Args:
        classes: Class names, in the order of the probability columns.
        batches: Per task: image identifiers, true labels, the task's name and probabilities (n, C).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "task", *(f"probability:{name}" for name in classes)])
    for images, labels, task, probabilities in batches:
        for image, label, row in zip(images, labels, probabilities.tolist(), strict=True):
            writer.writerow([image, label, task, *(f"{p:.6g}" for p in row)])
    return text.getvalue().encode()


def accuracy_plot(results: dict[str, Any]) -> bytes | None:
    """``accuracy.png``: the accuracy matrix and the curves over tasks; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # The object interface, without pyplot, leaves the caller's figures and backend alone.
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_matrix(left, results)
    _draw_curves(right, results)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _draw_matrix(axes: Axes, results: dict[str, Any]) -> None:
    matrix = [[float("nan") if cell is None else cell for cell in row] for row in results["accuracy_matrix"]]
    tasks = range(len(matrix))
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    known = [(t, i) for t in tasks for i in range(t + 1) if results["accuracy_matrix"][t][i] is not None]
    for t, i in known if len(matrix) <= _MOST_TASKS else []:
        dark = matrix[t][i] < 0.6
        axes.text(i, t, f"{100 * matrix[t][i]:.0f}", ha="center", va="center", color="w" if dark else "k")
    shown = list(tasks)[:: max(1, len(matrix) // _MOST_TASKS)]
    labels = [str(t + 1) for t in shown]
    axes.set_xticks(shown, labels)
    axes.set_yticks(shown, labels)
    axes.set(xlabel="test images of task", ylabel="after task", title=f"accuracy ({results['readout']})")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def _draw_curves(axes: Axes, results: dict[str, Any]) -> None:
    seen = results["readouts"][results["readout"]]["incremental_accuracy"]
    places = [t for t, share in enumerate(seen) if share is not None]
    steps = [t + 1 for t in places]
    for name, figures in results["readouts"].items():
        if figures is not None:
            own = name == results["readout"]
            curve = [figures["incremental_accuracy"][t] for t in places]
            axes.plot(steps, curve, marker="o", lw=2.5 if own else 1.2, label=f"all seen classes, {name}")
    axes.plot(
        steps,
        [_given_task(results, t) for t in places],
        marker="s",
        ls="--",
        color="0.4",
        label="given the true task, mean over tasks",
    )
    if len(steps) <= _MOST_TASKS:
        axes.set_xticks(steps)
    axes.set(xlabel="tasks learned", ylabel="accuracy", ylim=(0, 1.02), title="accuracy over seen tasks")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _given_task(results: dict[str, Any], task: int) -> float:
    """Accuracy given the true task after a task, mean over the tasks so far."""
    row = [share for share in results["oracle_accuracy_matrix"][task] if share is not None]
    return float(sum(row) / len(row))


def _curve(results: dict[str, Any]) -> list[list[str]]:
    """One row for each time that all test images seen so far were looked at."""
    seen = results["readouts"][results["readout"]]["incremental_accuracy"]
    return [
        [task["name"], percent(share), percent(_given_task(results, t))]
        for t, (task, share) in enumerate(zip(results["tasks"], seen, strict=True))
        if share is not None
    ]


def _figures(results: dict[str, Any]) -> str:
    columns = {name: figures for name, figures in results["readouts"].items() if figures is not None}
    header = ["", *(f"**{n}**" if n == results["readout"] else n for n in columns)]
    lines = [[title, *(_figure(c[key], key) for c in columns.values())] for key, title in _FIGURES]
    posterior = percent(results["task_posterior_accuracy"])
    lines.append(["Task of largest posterior", *(posterior for _ in columns)])
    return markdown_table(header, lines)


def _figure(value: float | None, key: str) -> str:
    if key == "calibration_error":
        return "-" if value is None else f"{value:.3f}"
    return percent(value)


def _matrix(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> str:
    return markdown_table(
        ["after", *names],
        [
            [name, *("" if c is None else percent(c) for c in row)]
            for name, row in zip(names, matrix, strict=True)
        ],
    )


def _tasks(results: dict[str, Any]) -> str:
    header = ["task", "classes", "train", "test", "seconds", "trainable", "stored MB"]
    header += ["norm O", "norm R", "own gate", "drift"]
    lines = []
    for task, drift in zip(results["tasks"], results["feature_drift"], strict=True):
        seconds = task["prepare_seconds"] + task["learn_seconds"] + task["consolidate_seconds"]
        lines.append(
            [
                task["name"],
                str(len(task["classes"])),
                str(task["train_images"]),
                str(task["test_images"]),
                f"{seconds:.1f}",
                f"{task['trainable_parameters']:,}",
                f"{task['stored_bytes'] / 1e6:.2f}",
                *(
                    _number(value)
                    for value in (task["orthogonal_norm"], task["residual_norm"], task["own_gate"], drift)
                ),
            ]
        )
    return markdown_table(header, lines)


def _cost(results: dict[str, Any]) -> str:
    inference, peak = results["inference"], results["peak_memory_bytes"]
    memory = "not measured" if peak is None else f"{peak / 2**20:,.0f} MiB"
    return (
        f"{inference['images_per_second']:.1f} images per second when predicting, forward passes per image: "
        f"{inference['forward_passes_per_image']}. Peak memory: {memory}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _listing(values: dict[str, Any]) -> str:
    return "\n".join(f"- {escape_cell(key)}: `{value}`" for key, value in _flat(values))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
