"""What the parser of forms has to say of a malformed one: its client is told, and the log needs no line."""

from __future__ import annotations

import logging

_NOWHERE = logging.NullHandler()


def hush_forms() -> None:
    """Keeps warnings about malformed forms off stderr, where Python prints what no handler takes.

    Whoever has set up handlers of their own still gets them.
    """
    logging.getLogger("python_multipart").addHandler(_NOWHERE)
