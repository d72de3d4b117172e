"""Exceptions whose message is meant for the user: one clear sentence with the remedy."""

from __future__ import annotations


class DualLoRAError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead."""

    exit_code: int = 2


class CheckFailed(DualLoRAError):
    """Accuracy on the ``--check`` folder fell by more than ``--max-drop``; the model was left as it was."""

    exit_code: int = 3
