"""JSON and Markdown: what is written to files and to stdout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; ``-`` for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(map(escape_cell, line)) + " |" for line in (header, rule, *lines))


def escape_cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
