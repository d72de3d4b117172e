from __future__ import annotations

import csv
import io
import sys

import pytest
import torch
from rich.console import Console

from duallora.runs import metrics, report
from duallora.runs.metrics import Hits


def make_results(names=("birds", "a|b"), calibrated=True):
    """Results of a run of len(names) tasks with 10 test images each, shaped as results.json."""
    rows = [[Hits(10, 9 - t + i, 9, 8 - t + i, 9) for i in range(t + 1)] for t in range(len(names))]
    readouts = {"heads": metrics.summary(rows, 0.2), "calibrated": metrics.summary(rows, 0.1)}
    own = "calibrated" if calibrated else "heads"
    if not calibrated:
        readouts["calibrated"] = None
    task = {
        "train_images": 40,
        "test_images": 10,
        "prepare_seconds": 1.0,
        "learn_seconds": 2.0,
        "consolidate_seconds": 0.5,
        "trainable_parameters": 1234,
        "stored_bytes": 2_500_000,
        "orthogonal_norm": 0.01,
        "residual_norm": None,
        "own_gate": 0.75 if calibrated else None,
    }
    return {
        "version": 1,
        "readout": own,
        **readouts[own],
        "task_posterior_accuracy": 0.9 if calibrated else None,
        "feature_drift": [0.125] * (len(names) - 1) + [0.0],
        "readouts": readouts,
        "tasks": [{"name": name, "classes": [f"{name}-0", f"{name}-1"], **task} for name in names],
        "inference": {"images_per_second": 100.0, "forward_passes_per_image": 1},
        "peak_memory_bytes": 3 * 2**20 if calibrated else None,
        "backbone": {"name": "embedded", "sha256": "ab" * 32},
        "stream": {"name": "photos", "class_order": [*"abcd"], "order_seed": 1993},
        "config": {"seed": 0, "method": {"name": "duallora", "rank": 10}},
        "environment": {"python": "3.11.7"},
    }


def test_markdown_shows_every_figure():
    text = report.markdown(make_results(), plot=True)
    assert "| Final accuracy, all seen test images | 85.0 | 85.0 |" in text
    assert "| Calibration error, 15 bins | 0.200 | 0.100 |" in text
    assert "| Task of largest posterior | 90.0 | 90.0 |" in text
    assert "| birds | 90.0 |  |" in text
    assert "![Accuracy after every task](accuracy.png)" in text
    assert "| birds | 2 | 40 | 10 | 3.5 | 1,234 | 2.50 | 0.01 | - | 0.75 | 0.125 |" in text
    assert "Peak memory: 3 MiB" in text
    assert "- method.rank: `10`" in text


def test_markdown_tables_survive_a_pipe_in_a_name():
    text = report.markdown(make_results(), plot=True)
    assert "a\\|b" in text
    tables = [line for line in text.splitlines() if line.startswith("| a")]
    assert all(line.replace("\\|", "").count("|") in (4, 12) for line in tables)


def test_markdown_without_plot_and_without_calibration():
    text = report.markdown(make_results(calibrated=False), plot=False)
    assert "pip install 'duallora[report]'" in text and "](accuracy.png)" not in text
    assert "|  | **heads** |" in text
    assert "| Task of largest posterior | - |" in text
    assert "Peak memory: not measured" in text


@pytest.mark.parametrize("tasks", [1, 2, 12])
@pytest.mark.parametrize("calibrated", [True, False])
def test_plot_is_a_png(tasks, calibrated):
    results = make_results([f"task {t}" for t in range(tasks)], calibrated)
    data = report.accuracy_plot(results)
    assert data is not None and data.startswith(b"\x89PNG")


def test_plot_without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert report.accuracy_plot(make_results()) is None


def test_terminal_table():
    console = Console(file=io.StringIO(), width=80)
    console.print(report.accuracy_table(make_results(["[bold]x", "y"])))
    text = console.file.getvalue()
    assert "[bold]x" in text and "all seen" in text and "85.0" in text


def test_a_wide_terminal_table_numbers_its_columns():
    names = [f"a rather long name {t}" for t in range(10)]
    table = report.accuracy_table(make_results(names))
    assert [column.header for column in table.columns] == ["after", *map(str, range(1, 11)), "all seen"]


def test_predictions_csv_can_be_read_back():
    batches = [
        (
            ["cat/1.jpg", 'odd "name", 2.jpg'],
            ["cat", "dog, small"],
            "task 1",
            torch.tensor([[0.9, 0.1], [0, 1]]),
        ),
        (["3"], ["cat"], "task 2", torch.tensor([[1 / 3, 2 / 3]])),
    ]
    text = report.predictions_csv(["cat", "dog, small"], batches).decode()
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0] == ["image", "label", "task", "probability:cat", "probability:dog, small"]
    assert lines[1] == ["cat/1.jpg", "cat", "task 1", "0.9", "0.1"]
    assert lines[2] == ['odd "name", 2.jpg', "dog, small", "task 1", "0", "1"]
    assert [float(p) for p in lines[3][3:]] == pytest.approx([1 / 3, 2 / 3], abs=1e-6)
    assert len(lines) == 4
