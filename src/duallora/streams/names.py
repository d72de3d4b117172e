"""Names of classes, tasks and files: one rule for every source of them."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence


def normal(name: str) -> str:
    """A name without space around it, in composed unicode (NFC).

    The same name can be composed or decomposed, depending on the machine that wrote it.
    """
    return unicodedata.normalize("NFC", name).strip()


def hint_at_case(names: Sequence[str], known: Iterable[str] = ()) -> None:
    """Warns of names that differ in upper and lower case alone: they are different classes.

    Args:
        names: of classes, different ones.
        known: classes that are there already.
    """
    seen: dict[str, str] = {}
    for name in (*known, *names):
        first = seen.setdefault(name.casefold(), name)
        if first != name:
            warnings.warn(
                f"the classes {first!r} and {name!r} differ in upper and lower case alone and are taken for "
                "two: if they are one, give them one name",
                stacklevel=3,
            )
