"""The lines of a comparison: methods by name, and named variants of them, with the fields that each gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands.configs import read_config, shipped_configs
from duallora.commands.parse_errors import nearest
from duallora.errors import DualLoRAError
from duallora.teaching.method_choice import TRAINING_FIELDS, just_these_epochs

if TYPE_CHECKING:
    from duallora.methods import MethodConfig

# What --same-budget takes away from a line's own values: how long it trains, how fast, and how large it is.
BUDGET_FIELDS = TRAINING_FIELDS | {"rank", "residual_rank", "first_adapted_layer"}


@dataclass(frozen=True)
class Line:
    """One line of a comparison.

    Attributes:
        name: As it was asked for; also the name of its runs.
        method: The method's registered name.
        config: Its fields.
    """

    name: str
    method: str
    config: MethodConfig


def read_lines(names: Sequence[str], shared: Mapping[str, Any], same_budget: bool) -> list[Line]:
    """Finds each line's method and fields.

    Args:
        names: A method, a shipped configuration ``methods/NAME`` by its NAME, or a path to a YAML file.
        shared: Fields for every line that has them. A line's own values win; with ``same_budget``, the shared
            ones do.
        same_budget: Take each method at its defaults, and leave out the `BUDGET_FIELDS` of the values of a
            variant.

    Raises:
        DualLoRAError: No line, an unknown one, two of one name, a field that no line has, or a value refused.
    """
    from duallora.methods import METHODS

    lines = []
    for asked in names:
        name, own = _own_values(asked, list(METHODS), same_budget)
        method = str(own.pop("name", name))
        if method not in METHODS:
            raise DualLoRAError(f"{asked} names the method {method}{nearest(method, list(METHODS))}")
        known = {field.name for field in fields(METHODS[method].config)}
        unknown = [field for field in own if field not in known]
        if unknown:
            raise DualLoRAError(f"{asked}: the method {method} has no field {unknown[0]}.")
        common = {field: value for field, value in shared.items() if field in known}
        if same_budget:
            kept = {field: value for field, value in own.items() if field not in BUDGET_FIELDS}
            values = _halved(METHODS[method].config(), kept) | kept | common
        else:
            values = common | own
        try:
            lines.append(Line(name, method, METHODS[method].config(**just_these_epochs(values))))
        except DualLoRAError as error:
            raise DualLoRAError(f"{asked}: {error}") from error
    _check(lines, shared)
    return lines


def _halved(default: MethodConfig, kept: Mapping[str, Any]) -> dict[str, int]:
    """Ranks of a variant with both adapters of DualLoRA; their sum is the rank of the others' one."""
    whole = getattr(default, "rank", 0)
    return (
        {"rank": whole - whole // 2, "residual_rank": whole // 2}
        if kept.get("residual", "none") != "none"
        else {}
    )


def _own_values(asked: str, methods: list[str], same_budget: bool) -> tuple[str, dict[str, Any]]:
    """A line's name and what its YAML file says of the method; for a method itself, those are its paper's."""
    path = Path(asked)
    if path.suffix in (".yaml", ".yml"):
        values = read_config(asked).get("method")
        if not isinstance(values, dict) or "name" not in values:
            raise DualLoRAError(f"{asked} names no method: write 'method:' and under it 'name: NAME'.")
        return path.stem, dict(values)
    if same_budget and asked in methods:
        return asked, {}
    shipped = f"methods/{asked}"
    if shipped in shipped_configs():
        return asked, dict(read_config(shipped)["method"])
    if asked in methods:
        return asked, {}
    variants = [name.removeprefix("methods/") for name in shipped_configs() if name.startswith("methods/")]
    raise DualLoRAError(f"there is no method {asked}{nearest(asked, sorted({*methods, *variants}))}")


def _check(lines: Sequence[Line], shared: Mapping[str, Any]) -> None:
    names = [line.name for line in lines]
    if not names:
        raise DualLoRAError("--methods names no method; duallora methods lists them.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DualLoRAError(f"--methods names {twice} twice; a variant needs a YAML file of another name.")
    for field in shared:
        if not any(hasattr(line.config, field) for line in lines):
            raise DualLoRAError(f"none of the methods has the field {field} (--method.{field}).")
