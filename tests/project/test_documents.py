"""The documents say where things are: links lead somewhere, named files exist, and none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "duallora"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """Headings of a page as GitHub names them in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page: Path) -> list[str]:
    """Links to files that are not there or to headings that their page does not have."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, heading = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or (heading and heading not in anchors(place)):
            wrong.append(link)
    return wrong


def missing_files(page: Path) -> list[str]:
    """Source files and folders that the page names in code quotes and that are nowhere in the project."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py|(?:[\w-]+/)+)`", text)
    saved = re.findall(r"^```python\n# ([\w-]+\.py)$", text, re.MULTILINE)  # what the reader is to write
    own = [name for name in named if not re.search("NAME|anchored", name) and name not in saved]
    tops = {path.name for path in (ROOT, PACKAGE) for path in path.iterdir() if path.is_dir()}
    bases = (ROOT, PACKAGE.parent, PACKAGE)
    return [
        name
        for name in own
        if (name.endswith(".py") or name.split("/")[0] in tops)
        and not any((base / name).exists() for base in bases)
        and not ("/" not in name and list(PACKAGE.rglob(name)))
    ]


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert wrong_links(page) == []


@pages
def test_named_files_are_there(page: Path) -> None:
    assert missing_files(page) == []


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](gone.md) [c](#three) `adapters/gone.py` `adapters/`\n")
    assert wrong_links(page) == ["gone.md", "#three"]
    assert missing_files(page) == ["adapters/gone.py"]


@pages
def test_no_placeholder_is_left(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^[A-Z][A-Z0-9_ ]{2,}$", text, re.MULTILINE) == []


def test_the_index_has_every_document() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    others = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in others if f"]({name})" not in index} == set()


def test_every_method_is_described() -> None:
    registry = (PACKAGE / "methods" / "__init__.py").read_text(encoding="utf-8")
    names = set(re.findall(r'^    "([\w-]+)": "\w+\.\w+",$', registry, re.MULTILINE))
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^### `([\w-]+)`", text, re.MULTILINE))
    assert names - described == {"duallora", "lora", "linear", "frozen", "joint"}
    glance = text.split("## At a glance")[1].split("\n## ")[0]
    assert {name for name in described if f"[`{name}`](#" not in glance} == set()


def test_the_architecture_lists_the_packages_in_the_order_of_their_imports() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Packages")[1]
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)
    order = (ROOT / "tests" / "project" / "test_imports.py").read_text(encoding="utf-8")
    names = re.findall(r'"(\w+)"', order.split("ORDER = (")[1].split(")")[0])
    assert listed == [name for name in reversed(names) if name != "__main__"]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(listed)
