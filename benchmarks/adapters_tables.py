"""Tables and pictures of the study of the adapters; see ``adapters.py``."""

from __future__ import annotations

from pathlib import Path


def write_tables(out: Path) -> None:
    """Writes ``tables.md``."""
