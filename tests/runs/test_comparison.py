"""What a comparison is made of: figures, marks, pages, lines and kept features, without a run."""

from __future__ import annotations

import base64
import copy
import csv
import dataclasses
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from command_line import Call, caller
from PIL import Image
from small_tasks import new_learner, small_config, three_tasks, unseen
from tiny import IMAGE, WIDTH, tiny_backbone

from duallora import METHODS, streams
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.commands import compared_methods as lines_module
from duallora.commands.compare_protocol import protocol
from duallora.commands.compared_methods import BUDGET_FIELDS, Line, read_lines
from duallora.commands.configs import read_config, shipped_configs
from duallora.errors import DualLoRAError
from duallora.methods import Method
from duallora.runs.comparison import (
    ACCURACIES,
    COSTS,
    Entry,
    Figure,
    Results,
    Spread,
    curves,
    marks,
    readouts,
    spread,
    to_csv,
)
from duallora.runs.comparison_page import markdown, page, plot, tables
from duallora.runs.results import images_per_second
from duallora.streams import Stream, TaskDataset, all_at_once
from duallora.streams.domains import with_domains

# Two tasks of 10 and 30 test images. All of it is made up, so that every figure is told from every other.
RUN: Results = {
    "readout": "calibrated",
    "task_posterior_accuracy": 0.5,
    "readouts": {
        "heads": {
            "oracle_accuracy_matrix": [[1.0, None], [0.8, 1.0]],
            "incremental_accuracy": [0.9, 0.7],
            "final_accuracy": 0.7,
            "final_row_accuracy": 0.65,
            "final_accuracy_task_mean": 0.72,
            "average_incremental_accuracy": 0.8,
            "forgetting": 0.3,
            "forgetting_given_task": 0.2,
            "backward_transfer": -0.28,
            "task_identity_accuracy": 0.75,
            "calibration_error": 0.12,
        },
        "calibrated": {
            "oracle_accuracy_matrix": [[1.0, None], [0.9, 0.7]],
            "incremental_accuracy": [0.92, 0.78],
            "final_accuracy": 0.78,
            "final_row_accuracy": 0.77,
            "final_accuracy_task_mean": 0.79,
            "average_incremental_accuracy": 0.85,
            "forgetting": 0.1,
            "forgetting_given_task": 0.05,
            "backward_transfer": -0.09,
            "task_identity_accuracy": 0.83,
            "calibration_error": 0.04,
        },
    },
    "tasks": [
        {
            "test_images": 10,
            "prepare_seconds": 1.0,
            "learn_seconds": 20.0,
            "consolidate_seconds": 3.0,
            "trainable_parameters": 3_000_000,
            "stored_bytes": 4_000_000,
        },
        {
            "test_images": 30,
            "prepare_seconds": 0.5,
            "learn_seconds": 10.0,
            "consolidate_seconds": 0.25,
            "trainable_parameters": 2_000_000,
            "stored_bytes": 7_500_000,
        },
    ],
    "inference": {"images_per_second": 250.0, "forward_passes_per_image": 2},
}
OF_HEADS = {
    "final_accuracy": 0.7,
    "final_row_accuracy": 0.65,
    "final_accuracy_task_mean": 0.72,
    "given_task": (0.8 * 10 + 1.0 * 30) / 40,
    "average_incremental_accuracy": 0.8,
    "forgetting": 0.3,
    "forgetting_given_task": 0.2,
    "backward_transfer": -0.28,
    "task_identity_accuracy": 0.75,
    "task_posterior_accuracy": 0.5,
    "calibration_error": 0.12,
}
OF_COST = {
    "trainable_mb": 12.0,  # the larger task's, four bytes each
    "stored_mb": 7.5,  # after the last task
    "training_seconds": 34.75,
    "images_per_second": 250.0,
    "forward_passes": 2,
}
BETWEEN_TASKS = {
    "final_row_accuracy",
    "given_task",
    "average_incremental_accuracy",
    "forgetting",
    "forgetting_given_task",
    "backward_transfer",
    "task_identity_accuracy",
    "task_posterior_accuracy",
}
FIGURES = {figure.key: figure for figure in (*ACCURACIES, *COSTS)}


def result(final: float | None = None, **changes: Any) -> Results:
    """A copy of the made-up results, with another final accuracy under both readouts."""
    made = copy.deepcopy(RUN | changes)
    for figures in made["readouts"].values():
        if figures is not None and final is not None:
            figures["final_accuracy"] = final
    return made


def plain(final: float | None = None) -> Results:
    """Results of a method that calibrates nothing."""
    made = result(final, readout="heads")
    made["readouts"]["calibrated"] = None
    return made


def line(name: str, *runs: Results, **about: Any) -> Entry:
    known = {"method": "lora", "reconstruction": False, "upper_bound": False}
    return Entry(name, **{**known, **about}, seeds=tuple(range(len(runs))), runs=runs)


def joint(*runs: Results) -> Entry:
    """A line that learned all at once: its results have one task."""
    single = [result(**{**run, "tasks": run["tasks"][-1:]}) for run in runs]
    for run in single:
        for figures in run["readouts"].values():
            figures["oracle_accuracy_matrix"] = [[figures["final_accuracy"]]]
            figures["incremental_accuracy"] = [figures["final_accuracy"]]
    return line("joint", *single, method="joint", upper_bound=True)


# -- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [*OF_HEADS.items(), *OF_COST.items()])
def test_a_figure_is_what_the_results_say(key: str, value: float) -> None:
    assert FIGURES[key].get(RUN, "heads") == pytest.approx(value, rel=1e-12)


def test_every_figure_has_a_value_here() -> None:
    assert set(FIGURES) == {*OF_HEADS, *OF_COST}


def test_a_figure_is_of_the_readout_asked_for() -> None:
    for key in OF_HEADS:
        values = [FIGURES[key].get(RUN, readout) for readout in ("heads", "calibrated")]
        assert (values[0] == values[1]) == (key == "task_posterior_accuracy"), key
    assert FIGURES["given_task"].get(RUN, "calibrated") == pytest.approx((9 + 21) / 40)


def test_a_figure_between_tasks_is_not_there_for_one_task() -> None:
    (run,) = joint(RUN).runs
    assert {key for key, figure in FIGURES.items() if figure.get(run, "heads") is None} == BETWEEN_TASKS


def test_the_spread_is_the_sample_standard_deviation() -> None:
    found = spread(line("a", result(0.7), result(0.8), result(0.9)), FIGURES["final_accuracy"], "heads")
    assert found == (pytest.approx(0.8), pytest.approx(0.1))
    assert spread(line("a", result(0.7)), FIGURES["final_accuracy"], "heads") == Spread(0.7, None)


def test_a_readout_counts_only_where_all_runs_have_it() -> None:
    assert readouts(line("a", RUN, RUN)) == ["heads", "calibrated"]
    assert readouts(line("a", RUN, plain())) == ["heads"]
    assert spread(line("a", plain()), FIGURES["final_accuracy"], "calibrated") is None
    assert spread(line("a", plain()), FIGURES["final_accuracy"], "heads") == Spread(0.7, None)


def test_a_figure_that_is_undefined_in_a_run_is_of_the_others() -> None:
    undefined = result()
    undefined["readouts"]["heads"]["calibration_error"] = None
    figure = FIGURES["calibration_error"]
    assert spread(line("a", RUN, undefined), figure, "heads") == Spread(0.12, None)
    assert spread(line("a", undefined), figure, "heads") is None


def test_the_curve_is_over_the_seeds() -> None:
    other = result()
    other["readouts"]["heads"]["incremental_accuracy"] = [0.7, 0.7]
    found = curves(line("a", RUN, other), "heads")
    assert list(found) == [1, 2]
    assert [value.mean for value in found.values()] == pytest.approx([0.8, 0.7])
    assert [value.deviation for value in found.values()] == pytest.approx([0.02**0.5, 0.0])
    assert curves(line("a", RUN), "heads") == {1: Spread(0.9, None), 2: Spread(0.7, None)}


def test_the_curve_leaves_out_what_was_not_looked_at() -> None:
    other = result()
    other["readouts"]["heads"]["incremental_accuracy"] = [None, 0.7]
    assert list(curves(line("a", RUN, other), "heads")) == [2]


# -- marks --------------------------------------------------------------------------------------------------


def marked(
    *column: tuple[float, float | None] | None, better: int = 1, upper: Sequence[int] = ()
) -> list[str]:
    """Marks of lines with these means and deviations; the upper bounds are given by their places."""
    entries = [line(str(i), upper_bound=i in upper) for i in range(len(column))]
    return marks(entries, [None if value is None else Spread(*value) for value in column], better)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([(0.7, 0.01), (0.9, 0.01), (0.8, 0.01)], ["", "best", "second"]),
        ([(0.9, 0.01), (0.88, 0.03), (0.5, 0.01)], ["", "", ""]),  # 0.02 ahead, the other's spread is 0.03
        ([(0.9, 0.03), (0.88, 0.01), (0.5, 0.01)], ["", "", ""]),  # its own spread counts as well
        ([(0.9, 0.01), (0.8, 0.01), (0.795, 0.01)], ["best", "", ""]),
        ([(0.9, 0.01), (0.85, 0.01), (0.5, 0.45)], ["", "", ""]),  # every line behind counts, not the next
        ([(0.9, 0.01), (0.9, 0.01), (0.5, 0.01)], ["", "", ""]),
        ([(0.9, 0.0), (0.9, 0.0)], ["", ""]),
        ([(0.9, 0.0), (0.8, 0.0)], ["best", ""]),
        ([(0.9, 0.01)], [""]),  # no line behind
        ([(0.9, 0.01), None, (0.5, 0.01)], ["best", "", ""]),
        ([None, None], ["", ""]),
        ([], []),
    ],
)
def test_a_mark_needs_a_lead_above_the_spread(
    column: list[tuple[float, float] | None], expected: list[str]
) -> None:
    assert marked(*column) == expected
    turned = [None if value is None else (-value[0], value[1]) for value in column]
    assert marked(*turned, better=-1) == expected
    assert marked(*column, better=0) == ["" for _ in column]


def test_a_lead_as_large_as_the_spread_is_none() -> None:
    assert marked((1.0, 0.25), (0.75, 0.25)) == ["", ""]
    assert marked((1.0, 0.25), (0.7499, 0.25)) == ["best", ""]


def test_a_single_seed_is_never_marked_and_counts_with_the_largest_spread() -> None:
    assert marked((0.9, None), (0.5, 0.01), (0.4, 0.01)) == ["", "", ""]
    assert marked((0.9, 0.01), (0.85, None), (0.4, 0.02)) == ["best", "", ""]
    assert marked((0.9, 0.01), (0.85, None), (0.4, 0.06)) == ["", "", ""]
    assert marked((0.9, None), (0.5, None)) == ["", ""]


def test_the_upper_bound_takes_no_part_in_the_marks() -> None:
    assert marked((0.99, 0.01), (0.9, 0.01), (0.8, 0.01), upper=[0]) == ["", "best", ""]
    # Not with its spread either, which would be the largest.
    assert marked((0.99, 0.5), (0.9, 0.01), (0.8, None), upper=[0]) == ["", "best", ""]


# -- csv ----------------------------------------------------------------------------------------------------

LINES = [
    line("duallora", result(0.81), result(0.83), method="duallora"),
    line("heads <i>only</i> | a", plain(0.6), plain(0.65)),
    line("sora", result(0.5), method="sora", reconstruction=True),
    joint(result(0.9), result(0.95)),
]


def test_csv_has_every_line_and_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(LINES).decode())))
    assert [(row["line"], row["readout"]) for row in rows] == [
        (entry.name, readout) for entry in LINES for readout in readouts(entry)
    ]
    assert set(rows[0]) == {
        *("line", "method", "reconstruction", "readout", "own_readout", "seeds"),
        *(f"{key}{part}" for key in FIGURES for part in ("", "_sd")),
    }
    entries = {entry.name: entry for entry in LINES}
    for row in rows:
        entry = entries[row["line"]]
        assert row["own_readout"] == str(row["readout"] == entry.runs[0]["readout"]).lower()
        assert row["seeds"] == " ".join(str(seed) for seed in entry.seeds)
        for key, figure in FIGURES.items():
            expected = spread(entry, figure, row["readout"]) or (None, None)
            for name, value in zip((key, f"{key}_sd"), expected, strict=True):
                assert (row[name] == "") == (value is None), (row["line"], name)
                assert value is None or float(row[name]) == pytest.approx(value, rel=1e-5), name
    assert [row["reconstruction"] for row in rows if row["line"] in ("sora", "duallora")] == [
        *("false", "false"),
        *("true", "true"),
    ]


# -- pages --------------------------------------------------------------------------------------------------

PROTOCOL = ["stream photos & <more>: 2 tasks", "backbone tiny"]
COMMAND = "duallora compare --out x --methods 'a<b'"
TITLES = ["Accuracy", "All figures: heads", "All figures: calibrated", "Cost"]


def test_the_tables_show_every_line_and_every_figure() -> None:
    made = tables(LINES)
    assert [table.title for table in made] == TITLES
    labels = [entry.label for entry in LINES]
    assert labels == [
        "duallora",
        "heads <i>only</i> | a",
        "sora (reconstruction)",
        "joint (all data at once)",
    ]
    for table in made:
        shown = labels if table.title != "All figures: calibrated" else [labels[0], *labels[2:]]
        assert [row[0] for row in table.cells] == shown
        assert all(
            len(row) == len(table.header) == len(m) for row, m in zip(table.cells, table.marked, strict=True)
        )
    for table, figures in zip(made[1:], (ACCURACIES, ACCURACIES, COSTS), strict=True):
        assert table.header[3:] == [figure.title for figure in figures]
    first = dict(zip(made[0].header, made[0].cells[0], strict=True))
    assert first == {
        "method": "duallora",
        "predicts with": "calibrated",
        "seeds": "0, 1",
        "final, heads": "82.0 ± 1.4",
        "final, calibrated": "82.0 ± 1.4",
        "given the task": "75.0 ± 0.0",
        "average incremental": "85.0 ± 0.0",
        "forgetting": "10.0 ± 0.0",
        "forgetting given the task": "5.0 ± 0.0",
    }
    assert made[0].cells[1][3:5] == ["62.5 ± 3.5", "-"]
    assert made[0].cells[2][3:5] == ["50.0", "50.0"]  # one seed has no spread
    assert made[3].cells[0][3:] == ["12.00 ± 0.00", "7.5 ± 0.0", "35 ± 0", "250 ± 0", "2"]


def test_joint_has_no_figures_between_tasks() -> None:
    for table in tables(LINES)[1:3]:
        shown = dict(zip([f.key for f in ACCURACIES], table.cells[-1][3:], strict=True))
        assert {key for key, cell in shown.items() if cell == "-"} == BETWEEN_TASKS
        assert shown["final_accuracy"] == "92.5 ± 3.5"


def test_the_marks_on_the_pages_are_those_of_the_figures() -> None:
    ahead = [line("a", result(0.9), result(0.92)), line("b", result(0.7), result(0.71)), *LINES[1:2]]
    table = tables(ahead)[0]
    column = table.header.index("final, heads")
    assert [row[column] for row in table.marked] == ["best", "second", ""]
    text = markdown(ahead, PROTOCOL, COMMAND, plot=False)
    assert "| **91.0 ± 1.4** |" in text and "| *70.5 ± 0.7* |" in text
    html = page(ahead, PROTOCOL, COMMAND, None)
    assert '<td class="best">91.0 ± 1.4</td>' in html and '<td class="second">70.5 ± 0.7</td>' in html
    # Forgetting is equal in all three: nothing leads.
    assert {row[table.header.index("forgetting")] for row in table.marked} == {""}


def test_markdown_has_every_line_and_keeps_its_columns() -> None:
    text = markdown(LINES, PROTOCOL, COMMAND, plot=True)
    for title in TITLES:
        section = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
        rows = [row.replace("\\|", "/") for row in section.splitlines() if row.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1, title
        names = [row.split("|")[1].strip() for row in rows[2:]]
        assert names[-2:] == ["sora (reconstruction)", "joint (all data at once)"]
        assert names[0] == "duallora"
        assert ("heads <i>only</i> / a" in names) == (title != "All figures: calibrated")
    for part in (*(f"- {item}\n" for item in PROTOCOL), f"```sh\n{COMMAND}\n```", "](compare.png)"):
        assert part in text
    for part in ("computed once for all runs", "class rows of DualLoRA, whose", "read more than the final"):
        assert part in text and part in page(LINES, PROTOCOL, COMMAND, None)
    assert "](compare.png)" not in markdown(LINES, PROTOCOL, COMMAND, plot=False)
    assert "compare.png was not drawn" in markdown(LINES, PROTOCOL, COMMAND, plot=False)


def test_the_page_is_one_file_without_scripts_or_addresses() -> None:
    html = page(LINES, PROTOCOL, COMMAND, b"\x89PNG made up")
    assert base64.b64encode(b"\x89PNG made up").decode() in html
    assert not re.search(r"<script|https?:|<link|<iframe|@import|url\(", html)
    assert re.findall(r'(?:src|href)="([^"]{0,15})', html) == ["data:image/png;"]
    assert "<img" not in page(LINES, PROTOCOL, COMMAND, None)
    assert "compare.png was not drawn" in page(LINES, PROTOCOL, COMMAND, None)


def test_the_page_has_every_line_and_escapes_names() -> None:
    html = page(LINES, PROTOCOL, COMMAND, None)
    assert html.count('<th scope="row">duallora</th>') == len(TITLES)
    assert html.count('<th scope="row">sora (reconstruction)</th>') == len(TITLES)
    assert html.count('<th scope="row">joint (all data at once)</th>') == len(TITLES)
    assert html.count('<th scope="row">heads &lt;i&gt;only&lt;/i&gt; | a</th>') == len(TITLES) - 1
    assert "<i>" not in html
    assert "photos &amp; &lt;more&gt;" in html and "a&lt;b" in html


def test_the_curves_are_drawn_whatever_a_line_is_called() -> None:
    odd = [dataclasses.replace(LINES[0], name=name) for name in ("$\\frac$", "a_b^c", "$x")]
    data = plot([*LINES, *odd])
    assert data is not None
    assert Image.open(io.BytesIO(data)).size == (1650, 770)


def test_the_bands_and_the_upper_bound_are_in_the_picture() -> None:
    def pixels(*entries: Entry) -> Any:
        data = plot(entries)
        assert data is not None
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    wide = line("a", result(), result())
    for figures in wide.runs[0]["readouts"].values():
        figures["incremental_accuracy"] = [0.5, 0.4]
    band = pixels(wide)
    means = line("a", result())
    for readout, figures in means.runs[0]["readouts"].items():
        figures["incremental_accuracy"] = [value.mean for value in curves(wide, readout).values()]
    # The mean's curve is the same; what is added is the band, which covers a good part of the panels.
    assert (band != 255).any(2).mean() > (pixels(means) != 255).any(2).mean() + 0.05
    assert not np.array_equal(pixels(LINES[0]), pixels(LINES[0], LINES[3]))


def test_no_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert plot(LINES) is None


# -- lines --------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, method: object) -> str:
    """A YAML file with this method block; its path as on a command line."""
    path = folder / name
    path.write_text(json.dumps({"method": method}))
    return str(path)


def only(names: Sequence[str], shared: dict[str, Any] | None = None, same_budget: bool = False) -> Line:
    (found,) = read_lines(names, shared or {}, same_budget)
    return found


def refusal(names: Sequence[str], shared: dict[str, Any] | None = None) -> str:
    with pytest.raises(DualLoRAError) as caught:
        read_lines(names, shared or {}, False)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_line_is_a_method_with_the_values_of_its_paper() -> None:
    assert only(["lora"]) == Line("lora", "lora", METHODS["lora"].config())
    found = only(["inflora"])
    assert (found.name, found.method) == ("inflora", "inflora")
    assert found.config == METHODS["inflora"].config(**_own("inflora"))
    assert vars(found.config)["epochs"] == 50


def _own(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(read_config(f"methods/{name}")["method"])
    del fields["name"]
    return fields


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("duallora-heads", {"calibration": "none"}),
        (
            "duallora-paper",
            {
                "rank": 10,
                "residual": "next",
                "relevance": "energy",
                "moments": "class_token",
                "projections": "qv",
                "calibration": "task",
            },
        ),
    ],
)
def test_a_line_is_a_shipped_variant(name: str, fields: dict[str, Any]) -> None:
    assert only([name]) == Line(name, "duallora", METHODS["duallora"].config(**fields))


def test_a_line_is_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, "small.yaml", {"name": "lora", "rank": 3})
    assert only([file]) == Line("small", "lora", METHODS["lora"].config(rank=3))
    (tmp_path / "bare.yml").write_text("method: lora\n")
    assert only([str(tmp_path / "bare.yml")]) == Line("bare", "lora", METHODS["lora"].config())
    both = read_lines(["lora", file], {}, False)
    assert [found.name for found in both] == ["lora", "small"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["inflor"], ["no method inflor;", "did you mean inflora"]),
        (["duallora-head"], ["did you mean duallora-heads"]),
        (["lora", "xyz"], ["no method xyz;", "valid are", "duallora-paper", "ncm"]),
        (["lora", "ncm", "lora"], ["lora twice", "YAML file of another name"]),
        (["nowhere/mine.yaml"], ["no file nowhere/mine.yaml"]),
        ([], ["no method", "duallora methods"]),
    ],
)
def test_a_wrong_line_is_refused(names: list[str], parts: list[str]) -> None:
    sentence = refusal(names)
    assert not [part for part in parts if part not in sentence], sentence


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ({"rank": 3}, ["names no method", "name: NAME"]),
        (None, ["names no method", "name: NAME"]),
        ({"name": "loro"}, ["the method loro", "did you mean lora"]),
        ({"name": ["lora"]}, ["the method ['lora']"]),
        ({"name": "lora", "sparsity": 1.0}, ["the method lora has no field sparsity"]),
        ({"name": "lora", "epochs": 0}, ["epochs must be above 0"]),
        ({"name": "lora", "epochs": "many"}, ["epochs must be a whole number"]),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, method: object, parts: list[str]) -> None:
    file = written(tmp_path, "mine.yaml", method)
    sentence = refusal([file])
    assert not [part for part in (file, *parts) if part not in sentence], sentence


def test_a_file_may_not_take_the_name_of_another_line(tmp_path: Path) -> None:
    assert "lora twice" in refusal(["lora", written(tmp_path, "lora.yaml", {"name": "lora", "rank": 3})])


def test_the_same_budget_takes_how_long_how_fast_and_how_large_from_a_file(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "epochs": 9,
        "batch_size": 5,
        "learning_rate": 1.0,
        "head_learning_rate": 1.0,
        "rank": 3,
    }
    kept = {"projections": "qkv", "tau": 3.0}
    own |= {"learning_rate": 1.0, "head_learning_rate": 1.0}
    own |= {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.1}
    budget = {**own, "first_adapted_layer": 0}
    file = written(tmp_path, "mine.yaml", {"name": "lora", **budget, **kept})
    assert only([file]).config == METHODS["lora"].config(**budget, **kept)
    assert only([file], same_budget=True).config == METHODS["lora"].config(**kept)
    dual = written(tmp_path, "dual.yaml", {"name": "duallora", "residual_rank": 3, "residual": "own"})
    assert only([dual], same_budget=True).config == METHODS["duallora"].config(
        residual="own", rank=10, residual_rank=10
    )
    assert set(budget) | {"residual_rank"} == lines_module.BUDGET_FIELDS


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("methods/")])
def test_every_shipped_line_is_valid_with_and_without_the_same_budget(name: str) -> None:
    stem = name.removeprefix("methods/")
    own = _own(stem)
    found = only([stem])
    assert found.name == stem
    assert {field: vars(found.config)[field] for field in own} == own
    reset = only([stem], same_budget=True).config
    default = METHODS[found.method].config()
    for field, value in vars(reset).items():
        # A method itself is at its defaults then; what makes a variant one stays.
        of_variant = stem not in METHODS and field in own and field not in BUDGET_FIELDS
        if field in ("rank", "residual_rank") and getattr(reset, "residual", "none") != "none":
            continue
        assert value == (own[field] if of_variant else vars(default)[field]), field
    if getattr(reset, "residual", "none") != "none":  # two adapters have no more than one
        assert vars(reset)["rank"] + vars(reset)["residual_rank"] == vars(default)["rank"]


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("sd-lora", ("sgd", "constant", 0.0, 0.008)),
        ("ranpac", ("sgd", "cosine", 5e-4, 0.01)),
        ("slca", ("sgd", "cosine", 5e-4, 0.01)),
        ("o-lora", ("adam", "constant", 0.0, 0.005)),
        ("l2p", ("adam", "constant", 0.0, 0.001875)),
        ("sldc", ("adamw", "cosine", 0.0, 0.001)),
    ],
)
def test_the_optimiser_of_a_paper_is_not_that_of_the_same_budget(name: str, paper: tuple[Any, ...]) -> None:
    def found(same_budget: bool) -> tuple[Any, ...]:
        config = only([name], same_budget=same_budget).config
        return config.optimizer, config.schedule, config.weight_decay, config.head_learning_rate

    assert found(same_budget=False) == paper
    assert found(same_budget=True) == ("adam", "cosine", 0.0, 0.005)


def test_every_shipped_line_says_what_it_is_and_where_values_are_from() -> None:
    folder = Path(cast(str, lines_module.__file__)).parent.parent / "configs" / "methods"
    assert {f"methods/{path.stem}" for path in folder.iterdir()} <= set(shipped_configs())
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text().splitlines()
        assert text[0].startswith("# "), path.name
        values = [row for row in text if re.match(r"  \w+: ", row) and not row.startswith("  name:")]
        paper = METHODS[read_config(f"methods/{path.stem}")["method"]["name"]].method.paper
        own = path.stem not in ("duallora-heads", "duallora-paper")
        # One comment for a block of values of one source is enough; a value of a paper has its own.
        assert not own or sum("#" in row for row in values) >= len(values) - 1, path.name
        assert paper, path.name


def test_shared_fields_lose_to_a_file_and_win_with_the_same_budget(tmp_path: Path) -> None:
    file = written(tmp_path, "mine.yaml", {"name": "lora", "epochs": 9, "projections": "qkv"})
    shared = {"epochs": 1, "projections": "qv", "batch_size": 7}
    own, same = only([file], shared).config, only([file], shared, same_budget=True).config
    assert own == METHODS["lora"].config(epochs=9, projections="qkv", batch_size=7)
    assert same == METHODS["lora"].config(epochs=1, projections="qv", batch_size=7)
    assert only(["lora"], shared).config == same


def test_shared_fields_go_to_the_lines_that_have_them() -> None:
    dual, lora = read_lines(["duallora", "lora"], {"residual": "own", "epochs": 2}, False)
    assert dual.config == METHODS["duallora"].config(residual="own", epochs=2)
    assert lora.config == METHODS["lora"].config(epochs=2)
    assert "--method.residual" in refusal(["lora", "ncm"], {"residual": "own"})
    assert "epochs must be above 0" in refusal(["lora"], {"epochs": 0})


# -- the protocol -------------------------------------------------------------------------------------------


def told(names: Sequence[str], same_budget: bool) -> list[str]:
    """What the page says of how these lines were trained and where they ran."""
    entries = []
    for found in read_lines(names, {}, same_budget):
        run = result(config={"method": {"name": found.method, **vars(found.config)}})
        run["environment"] = {"device": "cpu (x)", "threads": 1, "packages": {"torch": "2"}}
        if found.method != "duallora":  # the key is not in early results
            run["environment"]["precision"] = "bf16-mixed"
        for task in run["tasks"]:
            task["trainable_parameters"] *= found.method not in ("ncm", "ranpac")
        kind = METHODS[found.method].method
        entries.append(line(found.name, run, method=found.method, upper_bound=kind.all_at_once))
    setting = SimpleNamespace(stream=DIGITS, backbone=tiny_backbone(), augment="crop")
    sentences = protocol(entries, cast(Any, setting), same_budget)
    assert sentences[2] == "views of the training images: crop"
    return sentences[3:]


def test_one_budget_says_what_of_it_a_method_has() -> None:
    names = ["duallora", "lora", "duallora-paper", "l2p", "slca", "frozen", "ncm", "ranpac"]
    found = told(names, same_budget=True)
    assert found[0] == "one budget for all: 4 epochs, batches of 32, Adam, cosine to zero, heads at 0.005"
    assert found[1] == (
        "beside the heads: what is adapted at 0.002, rank 20, layers from 1 on (duallora, lora); "
        "what is adapted at 0.002, rank 10 + 10, layers from 1 on (duallora-paper); "
        "what is adapted at 0.002 (l2p); the whole backbone at 5e-05 (slca); nothing (frozen)"
    )
    assert found[2] == "nothing is trained: ncm, ranpac"
    assert found[-1] == (
        "run on: cpu (x), 1 threads, torch 2; cpu (x), 1 threads, torch 2, precision bf16-mixed"
    )
    assert "budgets differ" not in " ".join(found)
    assert told(["lora"], same_budget=True)[1] == (
        "beside the heads: what is adapted at 0.002, rank 20, layers from 1 on"
    )
    assert told(["ncm"], same_budget=True)[0] == "nothing is trained: ncm"


def test_the_values_of_papers_are_told_line_by_line() -> None:
    found = told(["slca", "sd-lora", "lora", "joint"], same_budget=False)
    assert found[0] == (
        "training: 50 epochs, batches of 128, SGD, cosine to zero, weight decay 0.0005, heads at 0.01 "
        "(slca); "
        "20 epochs, batches of 128, SGD, constant rates, heads at 0.008 (sd-lora); "
        "4 epochs, batches of 32, Adam, cosine to zero, heads at 0.005 (lora, joint)"
    )
    assert found[1] == (
        "beside the heads: the whole backbone at 0.0001 (slca); "
        "what is adapted at 0.008, rank 10, layers from 0 on (sd-lora); "
        "what is adapted at 0.002, rank 20, layers from 1 on (lora, joint)"
    )
    assert "budgets differ (--same-budget gives one to all)" in found[2]
    assert "the defaults of the package: lora, joint; joint is no upper bound" in found[2]
    assert "budgets differ" not in " ".join(told(["lora", "joint"], same_budget=False))


# -- the list of methods ------------------------------------------------------------------------------------


def test_methods_are_listed_with_paper_and_what_they_store(capsys: pytest.CaptureFixture[str]) -> None:
    call: Call = caller(capsys)
    found = json.loads(call("methods", "--json").out)
    assert [entry["name"] for entry in found] == list(METHODS)
    for entry in found:
        method = METHODS[entry["name"]].method
        assert (entry["paper"], entry["stores"]) == (method.paper, method.stores)
        assert entry["summary"] and entry["paper"] and entry["stores"]
        assert (entry["reconstruction"], entry["forward_passes"]) == (
            method.reconstruction,
            method.forward_passes,
        )
    assert any(entry["reconstruction"] for entry in found)
    text = call("methods").out
    firsts = [row.split("│")[1].strip() for row in text.splitlines() if row.startswith("│")]
    assert [name for name in firsts if name] == list(METHODS)
    flat = " ".join(re.sub("[│┃]", " ", text).split())
    assert flat.count("(reconstruction)") == sum(entry["reconstruction"] for entry in found)


# -- kept features ------------------------------------------------------------------------------------------


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def test_kept_features_are_those_of_the_evaluation_bit_for_bit(tmp_path: Path) -> None:
    images, backbone = pictures(100), tiny_backbone()
    kept = FrozenFeatures.compute(backbone, images.split(64))
    assert len(kept) == 100
    kept.save(tmp_path / "features.safetensors")
    loaded = FrozenFeatures.load(tmp_path / "features.safetensors", backbone)
    assert len(loaded) == 100
    with torch.no_grad():
        plain_features = torch.cat([backbone(batch) for batch in images.split(64)])
    for each in (kept, loaded):
        for batch, expected in zip(images.split(64), plain_features.split(64), strict=True):
            found = each.lookup(batch)
            assert found is not None and torch.equal(found, expected)
        # By what an image is, whatever its place.
        found = each.lookup(images[[70, 3, 3]])
        assert found is not None and torch.equal(found, plain_features[[70, 3, 3]])


def test_one_unknown_image_is_a_miss(tmp_path: Path) -> None:
    images = pictures(6)
    kept = FrozenFeatures.compute(tiny_backbone(), [images])
    other = images.clone()
    other[4, 0, 0, 0] += 1e-6
    assert kept.lookup(images) is not None
    assert kept.lookup(other) is None
    assert kept.lookup(other[:4]) is not None
    assert kept.lookup(pictures(2, seed=1)) is None


def test_equal_images_are_kept_once() -> None:
    images = pictures(4)
    assert len(FrozenFeatures.compute(tiny_backbone(), [images, images[:2]])) == 4


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _text(path: Path) -> None:
    path.write_text("no features")


def _other(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"features": torch.zeros(2, 2)}, path)


@pytest.mark.parametrize("damage", [_truncated, _text, _other, Path.unlink])
def test_features_that_cannot_be_read_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "features.safetensors"
    FrozenFeatures.compute(tiny_backbone(), [pictures(3)]).save(path)
    damage(path)
    with pytest.raises(DualLoRAError, match=r"features\.safetensors holds no features .* delete it"):
        FrozenFeatures.load(path, tiny_backbone())


@pytest.mark.parametrize("width", [WIDTH, 5 * WIDTH, 0])
def test_features_of_another_width_are_refused(tmp_path: Path, width: int) -> None:
    """A file of an earlier version holds the final features alone."""
    path, backbone = tmp_path / "features.safetensors", tiny_backbone()
    keys = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    FrozenFeatures(keys, torch.zeros(3, width)).save(path)
    expected = f"holds features of width {width}, but those of tiny-vit have width {backbone.row_dim}"
    with pytest.raises(DualLoRAError, match=rf"features\.safetensors {expected}.*; delete it") as caught:
        FrozenFeatures.load(path, backbone)
    assert "\n" not in str(caught.value)
    FrozenFeatures(keys, torch.zeros(3, backbone.row_dim)).save(path)
    assert len(FrozenFeatures.load(path, backbone)) == 3


def test_features_without_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    FrozenFeatures(torch.arange(48, dtype=torch.uint8).reshape(3, 16), torch.zeros(128)).save(path)
    with pytest.raises(DualLoRAError, match="holds features of width 128"):
        FrozenFeatures.load(path, tiny_backbone())


class Lying(FrozenFeatures):
    """Says of every image that its features are zero, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0, 4 * WIDTH))
        self.asked = 0

    def lookup(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.zeros(len(images), 4 * WIDTH)


def test_a_method_takes_its_frozen_features_from_the_cache_where_it_has_them() -> None:
    learner = new_learner(small_config("ncm"))
    images = pictures(3)
    method: Method = learner.method
    plain_features = method.frozen_features(images)
    assert torch.equal(plain_features, learner.backbone(images))
    method.context = replace(method.context, cache=FrozenFeatures.compute(tiny_backbone(), [images[:2]]))
    assert torch.equal(method.frozen_features(images), plain_features)  # one is missing: all are computed
    method.context = replace(method.context, cache=Lying())
    assert not method.frozen_features(images).any()


def test_the_speed_is_measured_without_the_cache() -> None:
    learner = new_learner(small_config("ncm"))
    task = three_tasks()[0]
    learner.learn(task)
    lying = Lying()
    learner.method.context = replace(learner.method.context, cache=lying)
    test = streams.task.as_task_dataset(unseen([task]))
    learner.outputs(test)
    asked = lying.asked
    assert asked > 0
    assert images_per_second(learner, [test]) > 0
    assert lying.asked == asked
    assert learner.method.context.cache is lying


# -- all tasks at once --------------------------------------------------------------------------------------


def labelled(part: TaskDataset) -> list[tuple[str, str, bytes]]:
    """Identifier, class name and pixels of every sample."""
    samples = (part[i] for i in range(len(part)))
    return [
        (name, part.classes[target], np.asarray(image).tobytes())
        for name, (image, target) in zip(part.identifiers, samples, strict=True)
    ]


DIGITS = streams.digits(3, classes=6, train_per_class=5, holdout=2)


@pytest.mark.parametrize(
    "stream", [DIGITS, with_domains(DIGITS, ["photo", "negative"])], ids=lambda s: s.name
)
def test_all_at_once_has_every_image_once_with_its_class(stream: Stream) -> None:
    joined = all_at_once(stream)
    (task,) = joined.tasks
    assert (joined.name, joined.order_seed, joined.augmentation) == (stream.name, 1993, "crop")
    for part in ("train", "test"):
        found: TaskDataset = getattr(task, part)
        assert found.classes == list(stream.class_order) == list(joined.class_order)
        expected = [sample for each in stream for sample in labelled(getattr(each, part))]
        assert Counter(labelled(found)) == Counter(expected)
        assert found.targets == [found[i][1] for i in range(len(found))]
        assert len(found) == sum(len(getattr(each, part)) for each in stream) > 0
        assert set(found.targets) == set(range(6))


def test_a_stream_of_one_task_is_at_once_already() -> None:
    stream = streams.digits(1, classes=2, train_per_class=3, holdout=1)
    assert all_at_once(stream) is stream


def test_the_figures_are_named_once() -> None:
    """A key is a column of compare.csv, a title one of a table."""
    every: list[Figure] = [*ACCURACIES, *COSTS]
    assert len({figure.key for figure in every}) == len({figure.title for figure in every}) == len(every)
