"""Scripts and the style sheet of the page, which the browser gets as they are."""

from __future__ import annotations

from importlib import resources


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
