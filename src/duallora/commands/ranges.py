"""Numbers that a type alone does not bound."""

from __future__ import annotations

from duallora.errors import DualLoRAError

LARGEST_SEED = 2**32 - 1


def require_range(option: str, value: float | None, low: float, high: float) -> None:
    """Refuses a number outside ``[low, high]``; None is a number that was not given.

    Raises:
        DualLoRAError: naming the option and the range.
    """
    if value is not None and not low <= value <= high:
        raise DualLoRAError(f"{option} must be from {low} to {high}, not {value}.")
