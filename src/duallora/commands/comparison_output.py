"""Writes the files of a comparison and prints its first tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console

if TYPE_CHECKING:
    from duallora.runs.comparison_tables import Comparison

_PRINTED = ("Published and measured", "Accuracy", "Room captured")


def write_comparison(comparison: Comparison, out: Path, **more: Any) -> None:
    """Writes ``compare.csv``, ``.json``, ``.md``, ``.html`` and, with matplotlib, ``.png``; prints the gist.

    Args:
        comparison: What the pages show.
        out: Folder, which is there.
        more: Further entries of ``compare.json``.
    """
    from duallora.runs import comparison_files, comparison_page, comparison_tables
    from duallora.storage.checkpoint import write_atomic

    plot = comparison_page.plot(comparison.entries)
    if plot is not None:
        write_atomic(out / "compare.png", plot)
    write_atomic(out / "compare.csv", comparison_files.to_csv(comparison.entries, comparison.evidence))
    write_atomic(out / "compare.json", comparison_files.to_json(comparison, **more))
    text = comparison_page.markdown(comparison, plot=plot is not None)
    write_atomic(out / "compare.md", text.encode())
    write_atomic(out / "compare.html", comparison_page.page(comparison, plot).encode())
    for table in comparison_tables.tables(comparison):
        if table.title in _PRINTED:
            console.rows(table.header, table.cells)
    if comparison.evidence.lacking:
        console.line(comparison.evidence.lacking)
    console.line(f"page: {out / 'compare.html'}")
