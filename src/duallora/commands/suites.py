"""Suites: a stream, a backbone and the lines that are compared on them, each as it was published.

``configs/suites/NAME.yaml``, or a file of one's own, has the options of the stream and the backbone, and
``order`` and ``seeds`` as a published protocol has them. Besides it has

- ``table``: whose protocols (``configs/paper/TABLE``) lines are run by, each with its own backbone, order and
  seeds; a suite that comes with the package has the table of its own name;
- ``lines``: by name. A line that says nothing is run by its protocol where there is one. Else it has the keys
  of a protocol that are not the suite's; without ``method``, the values of ``configs/methods/NAME.yaml``, or
  the defaults of the method NAME;
- ``images: {train: N, test: N, tasks: N}``, from which times are estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from duallora.commands.arguments import parse_values
from duallora.commands.configs import read_config, shipped_configs
from duallora.commands.number_ranges import seed_numbers
from duallora.commands.parse_errors import nearest
from duallora.commands.published_protocols import (
    Protocol,
    check_expected,
    ordering,
    protocols,
    read_protocol,
)
from duallora.commands.run import run
from duallora.errors import DualLoRAError

_BASES = ("frozen", "joint")


@dataclass(frozen=True)
class Suite:
    """What a suite's file says.

    Attributes:
        name: Of the file.
        table: Whose published protocols are lines; None where there are none.
        common: Options that lines without a published protocol share, with ``order`` and ``seeds``.
        own: Further lines, and what each changes.
        images: To train on and to test on, in all tasks, and the number of tasks; None where it does not say.
    """

    name: str
    table: str | None
    common: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    images: tuple[int, int, int] | None

    @property
    def lines(self) -> list[str]:
        """All lines that have a protocol or are named, those that the room lies between first."""
        published = [name.split("/")[1] for name in protocols() if name.split("/")[0] == self.table]
        names = dict.fromkeys([*(base for base in _BASES if base in self.own), *published, *self.own])
        return list(names)

    def protocol(self, line: str) -> Protocol:
        """How a line is run.

        Args:
            line: One of :attr:`lines`, or any method or shipped variant.

        Raises:
            DualLoRAError: There is none of that name, or what is said of it cannot be meant.
        """
        from duallora.methods import METHODS

        published = f"{self.table}/{line}"
        if not self.own.get(line) and published in protocols():
            return read_protocol(published)
        shipped = f"methods/{line}"
        variant = shipped in shipped_configs()
        if line not in self.own and not variant and line not in METHODS:
            raise DualLoRAError(
                f"the suite {self.name} has no line {line}{nearest(line, sorted({*self.lines, *METHODS}))}"
            )
        content = dict(self.common) | dict(self.own.get(line, {}))
        method = content.get("method")
        if method is None:
            content["method"] = read_config(shipped)["method"] if variant else {"name": line}
        elif isinstance(method, str):
            content["method"] = {"name": method}
        elif isinstance(method, Mapping):
            content["method"] = {"name": line} | dict(method)
        return self._checked(line, content)

    def _checked(self, line: str, content: dict[str, Any]) -> Protocol:
        """The same as `as_protocol`, for values that a user wrote."""
        name = f"{self.name}/{line}"
        seeds, expected = content.pop("seeds", 0), content.pop("expected", None) or {}
        numbers = seeds if isinstance(seeds, list) else [seeds]
        check_expected(name, expected)
        by_seed = ordering(content)
        try:
            read = parse_values("run", run, content | {"out": "."})
        except DualLoRAError as error:
            raise DualLoRAError(f"{name}: {error}") from error
        return Protocol(
            name,
            read["stream"],
            by_seed,
            read["backbone"],
            read["method"],
            tuple(seed_numbers(",".join(map(str, numbers)))),
            expected,
        )


def suites() -> list[str]:
    """Names of the suites that come with the package."""
    folder = resources.files("duallora") / "configs" / "suites"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def read_suite(name: str) -> Suite:
    """Reads a suite.

    Args:
        name: Of a suite that comes with the package, or the path of a YAML file.

    Raises:
        DualLoRAError: There is none of that name, or its file says something that cannot be meant.
    """
    if name in suites():
        with resources.as_file(resources.files("duallora") / "configs" / "suites" / f"{name}.yaml") as path:
            content = read_config(str(path))
    elif Path(name).suffix in (".yaml", ".yml"):
        content = read_config(name)
    else:
        raise DualLoRAError(f"there is no suite {name}{nearest(name, suites())}")
    own, table = content.pop("lines", None) or {}, content.pop("table", None)
    counts = content.pop("images", None)
    stem = Path(name).stem if name not in suites() else name
    if not isinstance(own, dict) or not all(isinstance(each, dict | None) for each in own.values()):
        raise DualLoRAError(
            f"the suite {name} is not sound: write 'lines:' and under it 'NAME: {{}}' for each."
        )
    if table is not None and not any(known.startswith(f"{table}/") for known in protocols()):
        raise DualLoRAError(f"the suite {name} names the table {table}, which has no protocol; leave it out.")
    images = _counts(name, counts)
    return Suite(
        stem,
        table or (name if name in suites() else None),
        content,
        {line: each or {} for line, each in own.items()},
        images,
    )


def _counts(name: str, given: Any) -> tuple[int, int, int] | None:
    if given is None:
        return None
    keys = ("train", "test", "tasks")
    values = [given.get(key) for key in keys] if isinstance(given, dict) else []
    train, test, tasks = numbers = [value if isinstance(value, int) else 0 for value in values] or [0, 0, 0]
    if min(numbers) < 1:
        raise DualLoRAError(f"'images' of the suite {name} must have train, test and tasks, each a number.")
    return train, test, tasks


def placed(protocol: Protocol, data: Path | None, split_lists: Path | None, weights: Path | None) -> Protocol:
    """The protocol with the places of this machine.

    Args:
        protocol: A line's.
        data: Folder of the data sets; None is ./data.
        split_lists: Folder with the public split of imagenet-r.
        weights: The weight file, or a folder that holds NAME.safetensors for every backbone by its name.

    Raises:
        DualLoRAError: The folder of weights has no such file.
    """
    backbone = protocol.backbone
    if weights is not None and weights.is_dir():
        file = weights / f"{backbone.backbone}.safetensors"
        if not file.is_file():
            raise DualLoRAError(f"{weights} has no {file.name}; put the weights of that backbone there.")
        weights = file
    return dataclasses.replace(
        protocol,
        stream=dataclasses.replace(protocol.stream, data=data, split_lists=split_lists),
        backbone=dataclasses.replace(backbone, backbone_file=weights),
    )
