"""Exceptions whose message is meant for the user: one clear sentence with the remedy."""

from __future__ import annotations

LONGEST = 2500
"""Characters of a message."""


class DualLoRAError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead.

    Args:
        message: names and contents of the user's files may be in it, so what would break the line or steer a
            terminal is escaped, and what is longer than a screen is cut.
    """

    exit_code: int = 2

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:LONGEST])
        super().__init__(printable + ("" if len(message) <= LONGEST else " ... (cut)"))


class CheckFailed(DualLoRAError):
    """Accuracy on the ``--check`` folder fell by more than ``--max-drop``; the model was left as it was."""

    exit_code: int = 3


def is_low_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; torch says it in words of a ``RuntimeError``."""
    words = f"{error}".lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(phrase in words for phrase in _LOW_MEMORY)


_LOW_MEMORY = ("not enough memory", "out of memory", "allocate memory")
