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


def seed_numbers(text: int | str) -> list[int]:
    """The seeds that ``--seeds`` names, each once and sorted.

    Raises:
        DualLoRAError: Something that is no number, or a number out of range.
    """
    try:
        numbers = sorted({int(part) for part in str(text).split(",")})
    except ValueError as error:
        raise DualLoRAError(f"--seeds must be numbers separated by commas, not {text!r}.") from error
    for number in numbers:
        require_range("--seeds", number, 0, LARGEST_SEED)
    return numbers
