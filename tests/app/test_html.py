"""Fragments of the page: names are escaped, and nothing is told by colour alone."""

from __future__ import annotations

import os

import pytest

from duallora.app import html

HOSTILE = "<img src=x onerror=alert(1)>&\"'"


@pytest.mark.parametrize(
    "fragment",
    [
        html.error(HOSTILE),
        html.done(HOSTILE),
        html.heading(2, HOSTILE),
        html.listing(HOSTILE, [HOSTILE]),
        html.table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, HOSTILE]]),
        html.bars(HOSTILE, (HOSTILE, HOSTILE), [(HOSTILE, 0.5, HOSTILE)]),
        html.matrix(HOSTILE, [HOSTILE], [[0.5]]),
        html.progress(HOSTILE, 1, 2),
        html.pictures([("data:,", HOSTILE)]),
        html.figure("data:,", HOSTILE),
    ],
)
def test_names_are_escaped(fragment: str) -> None:
    assert "<img src=x" not in fragment and "&lt;img" in fragment
    assert fragment.replace('alt=""', "").count('""') == 0


def test_a_file_name_that_is_no_unicode_is_shown() -> None:
    assert html.text(os.fsdecode(b"caf\xe9.png")) == "caf\\udce9.png"


def test_bars_say_their_values_and_matrices_their_places() -> None:
    assert "width:100.0%" in html.bars("a", ("b", "c"), [("x", 1.5, "150 %")])
    shown = html.matrix("accuracy", ["one", "two"], [[1.0, None], [0.5, 0.25]])
    assert shown.count('scope="row"') == 2 and "100.0" in shown and "25.0" in shown
