"""Published protocols: one row of a published table each, as ``configs/paper/TABLE/ROW.yaml`` says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from duallora.commands.configs import read_config
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.parse_errors import nearest
from duallora.errors import DualLoRAError
from duallora.teaching.method_choice import MethodChoice, just_these_epochs


@dataclass(frozen=True)
class Protocol:
    """One row of a published table, as ``configs/paper/TABLE/ROW.yaml`` says it.

    Attributes:
        name: ``TABLE/ROW``.
        stream: The data set, its tasks and their order; the order 0 stands for each run's seed.
        by_seed: Whether the class order is that of each run's seed; where the stream's own is alphabetical,
            seed 0 keeps it, as in CODA-Prompt's code.
        backbone: The backbone, its preprocessing and the training views.
        method: The method and its fields.
        seeds: Of the runs that were averaged.
        expected: Published figures (shares), with ``tolerance`` and ``source``; empty where none is known.
    """

    name: str
    stream: StreamOptions
    by_seed: bool
    backbone: BackboneOptions
    method: MethodChoice
    seeds: tuple[int, ...]
    expected: Mapping[str, Any]

    def ordered(self, seed: int) -> StreamOptions:
        """The stream of one run."""
        kept = not self.by_seed or (seed == 0 and self.stream.order == "alphabetical")
        return self.stream if kept else dataclasses.replace(self.stream, order=seed)


def protocols() -> list[str]:
    """Names of the protocols that come with the package."""
    folder = resources.files("duallora") / "configs" / "paper"
    return sorted(
        f"{table.name}/{row.name.removesuffix('.yaml')}"
        for table in folder.iterdir()
        for row in table.iterdir()
        if row.name.endswith(".yaml")
    )


def read_protocol(name: str) -> Protocol:
    """Reads a protocol by its name.

    Raises:
        DualLoRAError: There is none of that name, or it says something that cannot be meant.
    """
    if name not in protocols():
        raise DualLoRAError(f"there is no protocol {name}{nearest(name, protocols())}")
    with resources.as_file(resources.files("duallora") / "configs" / "paper" / f"{name}.yaml") as path:
        return as_protocol(name, read_config(str(path)))


def as_protocol(name: str, content: Mapping[str, Any]) -> Protocol:
    """A protocol from what its file says.

    Args:
        name: ``TABLE/ROW``.
        content: Options of the stream and the backbone, ``order`` (``seed`` and ``trial`` are told by each
            run's seed), ``seeds``, ``method`` and, where a figure is published, ``expected``.

    Raises:
        DualLoRAError: It says something that cannot be meant.
    """
    given = dict(content)
    missing = [key for key in ("seeds", "method") if key not in given]
    if missing:
        raise DualLoRAError(f"the protocol {name} has no {' and no '.join(missing)}; write them down.")
    seeds, expected = tuple(given.pop("seeds")), given.pop("expected", {})
    check_expected(name, expected)
    by_seed = ordering(given)
    method = just_these_epochs(given.pop("method"))
    groups = []
    for kind in (StreamOptions, BackboneOptions):
        own = {field.name for field in dataclasses.fields(kind)} & given.keys()
        groups.append(kind(**{key: given.pop(key) for key in own}))
    if given:
        raise DualLoRAError(f"the protocol {name} is not sound ({', '.join(given)}).")
    stream, backbone = groups
    return Protocol(
        name,
        stream,  # type: ignore[arg-type]
        by_seed,
        backbone,  # type: ignore[arg-type]
        MethodChoice(method.pop("name"), method),
        seeds,
        expected,
    )


def check_expected(name: str, expected: Any) -> None:
    """Refuses published figures without what is needed to judge by them.

    Raises:
        DualLoRAError: No final accuracy, tolerance or source, something else, or a share beyond [0, 1].
    """
    if not expected:
        return
    from duallora.runs.verdicts import FIGURES

    known = {*FIGURES, "tolerance", "source"}
    sound = (
        isinstance(expected, Mapping)
        and {"final_accuracy", "tolerance", "source"} <= expected.keys() <= known
    )
    shares = [value for key, value in expected.items() if key != "source"] if sound else []
    if not sound or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        raise DualLoRAError(
            f"'expected' of {name} is not sound: give final_accuracy, tolerance (shares in [0, 1]) and "
            "source, and average_incremental_accuracy where it is known."
        )


def ordering(given: dict[str, Any]) -> bool:
    """Whether the class order is that of each run's seed; the rule in ``given`` gives way to an order."""
    rule = given.get("order")
    if rule not in ("seed", "trial"):
        return False
    given["order"] = "alphabetical" if rule == "trial" else 0
    return True
