"""The pages of a comparison: tables, text, marks and the picture, without a run."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import sys
from typing import Any

import numpy as np
import pytest
from compared_runs import BETWEEN_TASKS, LINES, compared, line, result
from PIL import Image

from duallora.runs.comparison import (
    ACCURACIES,
    COSTS,
    Entry,
    curves,
)
from duallora.runs.comparison_page import markdown, page, plot
from duallora.runs.comparison_tables import tables

PROTOCOL = ["stream photos & <more>: 2 tasks", "backbone tiny"]
COMMAND = "duallora compare --out x --methods 'a<b'"
SHOWN = compared(LINES, PROTOCOL, COMMAND)
TITLES = ["Accuracy", "All figures: heads", "All figures: calibrated", "Cost"]


def test_the_tables_show_every_line_and_every_figure() -> None:
    made = tables(SHOWN)
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
    for table in tables(SHOWN)[1:3]:
        shown = dict(zip([f.key for f in ACCURACIES], table.cells[-1][3:], strict=True))
        assert {key for key, cell in shown.items() if cell == "-"} == BETWEEN_TASKS
        assert shown["final_accuracy"] == "92.5 ± 3.5"


def test_the_marks_on_the_pages_are_those_of_the_figures() -> None:
    ahead = [line("a", result(0.9), result(0.92)), line("b", result(0.7), result(0.71)), *LINES[1:2]]
    shown = compared(ahead, PROTOCOL, COMMAND)
    table = tables(shown)[0]
    column = table.header.index("final, heads")
    assert [row[column] for row in table.marked] == ["best", "second", ""]
    text = markdown(shown, plot=False)
    assert "| **91.0 ± 1.4** |" in text and "| *70.5 ± 0.7* |" in text
    html = page(shown, None)
    assert '<td class="best">91.0 ± 1.4</td>' in html and '<td class="second">70.5 ± 0.7</td>' in html
    # Forgetting is equal in all three: nothing leads.
    assert {row[table.header.index("forgetting")] for row in table.marked} == {""}


def test_markdown_has_every_line_and_keeps_its_columns() -> None:
    text = markdown(SHOWN, plot=True)
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
        assert part in text and part in page(SHOWN, None)
    assert "](compare.png)" not in markdown(SHOWN, plot=False)
    assert "compare.png was not drawn" in markdown(SHOWN, plot=False)


def test_the_page_is_one_file_without_scripts_or_addresses() -> None:
    html = page(SHOWN, b"\x89PNG made up")
    assert base64.b64encode(b"\x89PNG made up").decode() in html
    assert not re.search(r"<script|https?:|<link|<iframe|@import|url\(", html)
    assert re.findall(r'(?:src|href)="([^"]{0,15})', html) == ["data:image/png;"]
    assert "<img" not in page(SHOWN, None)
    assert "compare.png was not drawn" in page(SHOWN, None)


def test_the_page_has_every_line_and_escapes_names() -> None:
    html = page(SHOWN, None)
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
