"""Where the commands write: one JSON document or readable text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duallora.storage.documents import finite

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone

_PIPE_WIDTH = 200  # tables in files and pipes are not cut to the width of a terminal that is not there


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves the answer to the caller; rich would end the process here."""
        raise BrokenPipeError


def line(text: str, *, stderr: bool = False) -> None:
    """Prints one line as it is: no markup, no wrapping, no colours."""
    _console(stderr).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def table(content: Table, *, stderr: bool = False) -> None:
    """Prints a table, as wide as the terminal allows."""
    _console(stderr).print(content)


def rows(columns: list[str], cells: list[list[str]]) -> None:
    """Prints rows of text on stdout as a table; columns of numbers are aligned to the right.

    Args:
        columns: The heads of the columns.
        cells: One list a row.
    """
    content = Table()
    for position, column in enumerate(columns):
        numbers = all(_is_number(row[position]) for row in cells)
        content.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        content.add_row(*(Text(cell) for cell in row))
    table(content)


def document(content: Any) -> None:
    """Prints one JSON document on stdout; numbers that are not finite become null, as JSON has none."""
    sys.stdout.write(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def final_feature(backbone: Backbone) -> None:
    """Says what the final feature is, where it is not the class token."""
    if not backbone.has_class_token:
        line(f"final feature: {backbone.pooling}")


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(",", "").replace(".", "", 1).isdecimal()


def _console(stderr: bool) -> Console:
    # Made for every call: sys.stdout may have been replaced since the last.
    stream = sys.stderr if stderr else sys.stdout
    return _Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)
