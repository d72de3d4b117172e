"""A message is one line that a terminal can be shown, whatever the user's files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from duallora.errors import LONGEST, DualLoRAError
from duallora.streams.table import read_table


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\tb\0", "a\\r\\tb\\x00"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("left\u202eright\u2028", "left\\u202eright\\u2028"),
        ("Größe 大 é\u0301", "Größe 大 é\u0301"),
    ],
)
def test_what_breaks_a_line_or_steers_a_terminal_is_escaped(given: str, said: str) -> None:
    assert str(DualLoRAError(given)) == said


def test_a_long_message_is_cut() -> None:
    assert str(DualLoRAError("x" * LONGEST)) == "x" * LONGEST
    assert str(DualLoRAError("x" * LONGEST + "y")) == "x" * LONGEST + " ... (cut)"


def test_a_table_whose_first_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text('path,"la\nbel"\na.png,ant\n')
    with pytest.raises(DualLoRAError, match=r"images.csv is path,la\\nbel: it must be") as refused:
        read_table(tmp_path / "images.csv")
    assert "\n" not in str(refused.value)
