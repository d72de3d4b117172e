"""What a comparison is made of: figures, marks, pages, lines and kept features, without a run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

import pytest
from compared_runs import (
    BETWEEN_TASKS,
    FIGURES,
    LINES,
    OF_COST,
    OF_HEADS,
    RUN,
    compared,
    joint,
    line,
    plain,
    result,
)

from duallora.runs.comparison import (
    ACCURACIES,
    COSTS,
    Figure,
    Spread,
    curves,
    marks,
    readouts,
    spread,
)
from duallora.runs.comparison_files import to_csv, to_json
from duallora.runs.room import find_evidence

EVIDENCE = find_evidence(LINES)

# Two tasks of 10 and 30 test images. All of it is made up, so that every figure is told from every other.


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


def test_csv_has_every_line_and_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(LINES, EVIDENCE).decode())))
    assert [(row["line"], row["readout"]) for row in rows] == [
        (entry.name, readout) for entry in LINES for readout in readouts(entry)
    ]
    assert set(rows[0]) == {
        *("line", "method", "reconstruction", "readout", "own_readout", "seeds"),
        *(f"{key}{part}" for key in FIGURES for part in ("", "_sd")),
        *("room_captured", "room_captured_low", "room_captured_high"),
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


def test_json_has_every_line_and_every_figure() -> None:
    found = json.loads(to_json(compared(LINES, ["shared"], "duallora compare"), verdicts=[]))
    assert (found["version"], found["protocol"], found["verdicts"]) == (1, ["shared"], [])
    assert found["command"] == "duallora compare" and found["reference"] == "duallora"
    assert [told["name"] for told in found["lines"]] == [entry.name for entry in LINES]
    for told, entry in zip(found["lines"], LINES, strict=True):
        assert list(told["readouts"]) == readouts(entry)
        for readout, figures in told["readouts"].items():
            assert set(figures) == {*(figure.key for figure in ACCURACIES), "room_captured"}
            expected = spread(entry, FIGURES["final_accuracy"], readout)
            assert expected is not None and figures["final_accuracy"] == expected._asdict()
        assert set(told["cost"]) == {figure.key for figure in COSTS}


def test_the_figures_are_named_once() -> None:
    """A key is a column of compare.csv, a title one of a table."""
    every: list[Figure] = [*ACCURACIES, *COSTS]
    assert len({figure.key for figure in every}) == len({figure.title for figure in every}) == len(every)
