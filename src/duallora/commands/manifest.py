"""A saved model's description, as somebody may have edited it by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duallora.errors import DualLoRAError


@contextmanager
def intact(model: Path) -> Iterator[None]:
    """Inside, an entry of ``model.json`` that is missing or of another kind is refused with one sentence.

    Raises:
        DualLoRAError: naming the entry.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else f"{error}"
        raise DualLoRAError(
            f"{model / 'model.json'} is not as duallora wrote it ({detail}); restore it from a copy of "
            "the model."
        ) from error
