"""Imports go one way, and files stay small enough to read.

Every import counts: at the top of a module, in a function, and for the type checker alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "duallora"
MOST_LINES = 400
MOST_MODULES = 10

# From the lowest to the highest; a package or module imports from those before it and from itself.
ORDER = (
    "errors",
    "runtime",
    "storage",
    "backbones",
    "data",
    "transforms",
    "streams",
    "classifiers",
    "adapters",
    "methods",
    "training",
    "outputs",
    "predictions",
    "forgetting",
    "sharing",
    "learner",
    "export",
    "explaining",
    "runs",
    "teaching",
    "serving",
    "app",
    "bench",
    "commands",
    "cli",
    "__main__",
)

Graph = dict[str, set[str]]


def imports_below(folder: Path) -> Graph:
    """Module -> modules of the same package that it imports, the package's own ``__init__`` left out."""
    root = folder.name
    files = {_module(root, file.relative_to(folder)): file for file in folder.rglob("*.py")}
    found: Graph = {}
    for name, file in files.items():
        if name != root:  # it gives its names to others, and imports them when they are asked for
            asked = _imported(ast.parse(file.read_text(encoding="utf-8")), files)
            found[name] = asked - {name}
    return found


def _module(root: str, file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join([root, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _imported(tree: ast.AST, known: Iterable[str]) -> set[str]:
    known, found = set(known), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def place(module: str) -> str:
    """The package or module right below the top that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some cycle of a graph, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(graph: Graph, order: tuple[str, ...]) -> list[str]:
    """Imports from a lower to a higher place, and from the package's own ``__init__``."""
    rank = {name: i for i, name in enumerate(order)}
    return [
        f"{module} imports {asked}"
        for module, found in sorted(graph.items())
        for asked in sorted(found)
        if place(asked) not in rank or rank[place(asked)] > rank[place(module)]
    ]


def packages(graph: Graph) -> Graph:
    """The same between packages."""
    found: Graph = {place(module): set() for module in graph}
    for module, asked in graph.items():
        found[place(module)] |= {place(each) for each in asked} - {place(module)}
    return found


@pytest.fixture(scope="module")
def graph() -> Graph:
    return imports_below(SOURCE)


def test_no_module_imports_itself_through_others(graph: Graph) -> None:
    assert cycle(graph) == []


def test_no_package_imports_itself_through_others(graph: Graph) -> None:
    assert cycle(packages(graph)) == []


def test_imports_go_from_higher_to_lower(graph: Graph) -> None:
    assert sorted({place(module) for module in graph}) == sorted(ORDER)
    assert upward(graph, ORDER) == []


def test_few_modules_stand_at_the_top() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools"])
def test_files_are_short(folder: str) -> None:
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / folder).rglob("*.py")
    }
    assert lines and {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from toy.high import thing",
        "from toy import high",
        "import toy.high",
        "def later():\n    from toy.high import thing",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.high.inner import Thing",
    ],
)
def test_a_wrong_import_of_any_kind_is_found(tmp_path: Path, text: str) -> None:
    high = tmp_path / "toy" / "high"
    high.mkdir(parents=True)
    (tmp_path / "toy" / "__init__.py").write_text("")
    (tmp_path / "toy" / "low.py").write_text(text)
    (high / "__init__.py").write_text("thing = 1")
    (high / "inner.py").write_text("")
    found = imports_below(tmp_path / "toy")
    assert len(upward(found, ("low", "high"))) == 1
    assert cycle(found) == [] and upward(found, ("high", "low")) == []
    for file in ("__init__", "inner"):
        (high / f"{file}.py").write_text("from toy import low")
    assert cycle(imports_below(tmp_path / "toy")) and cycle(packages(imports_below(tmp_path / "toy")))
