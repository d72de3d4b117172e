"""``duallora streams``: what there is to learn, and where its files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from duallora.commands import console
from duallora.commands.parse_errors import nearest
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.streams import StreamEntry

_SCENARIOS = {"class": "new classes", "domain": "new domains"}


def streams(name: str | None = None, *, data: Path = Path("data"), json: bool = False) -> None:
    """List the streams, or say what one of them needs: files to fetch, their layout and where they go.

    Args:
        name: of a stream; all are listed where it is not given
        data: folder that holds the data sets
        json: print one JSON document
    """
    from duallora.streams import STREAMS

    prefixes = {known.partition(":")[0]: known for known in STREAMS}
    if name is not None and (name := prefixes.get(name, name)) not in STREAMS:
        raise DualLoRAError(f"there is no stream {name}{nearest(name, list(STREAMS))}")
    if json:
        shown = list(STREAMS.values()) if name is None else [STREAMS[name]]
        documents = [_document(entry, data) for entry in shown]
        console.document(documents if name is None else documents[0])
    elif name is None:
        _list(list(STREAMS.values()), data)
    else:
        _describe(STREAMS[name], data)


def _list(entries: list[StreamEntry], data: Path) -> None:
    console.rows(
        ["stream", "what it is", "classes", "images", "to fetch", "licence", "tasks have", "files go to"],
        [
            [
                entry.name,
                entry.summary,
                entry.classes,
                entry.images,
                entry.size,
                entry.licence,
                _SCENARIOS[entry.scenario],
                str(data / entry.folder) if entry.folder else "-",
            ]
            for entry in entries
        ],
    )
    console.line("what to fetch and the layout: duallora streams NAME; scenarios and splits: docs/streams.md")


def _describe(entry: StreamEntry, data: Path) -> None:
    console.line(f"{entry.name}: {entry.summary}")
    facts = {
        "classes": entry.classes,
        "images": entry.images,
        "to fetch": f"{entry.files} ({entry.size})" if entry.files else "",
        "page": entry.page,
        "licence": entry.licence,
        "usual tasks": _tasks(entry),
        "files go to": str(data / entry.folder) if entry.folder else "",
        "found": _found(entry, data) if entry.places else "",
    }
    for what, fact in facts.items():
        if fact not in ("", "-"):
            console.line(f"  {what}: {fact}")
    for title, lines in (("layout", entry.layout), ("notes", entry.notes)):
        if lines:
            console.line(f"  {title}:")
            for text in lines:
                console.line(f"    {text}")


def _tasks(entry: StreamEntry) -> str:
    if entry.scenario == "domain":
        return f"one a domain; {entry.tasks} with --scenario class"
    return str(entry.tasks)


def _found(entry: StreamEntry, data: Path) -> str:
    root = entry.find(data)
    return "no" if root is None else f"yes, in {root}"


def _document(entry: StreamEntry, data: Path) -> dict[str, object]:
    root = entry.find(data)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "classes": entry.classes,
        "images": entry.images,
        "size": entry.size,
        "licence": entry.licence,
        "scenario": entry.scenario,
        "tasks": entry.tasks,
        "page": entry.page,
        "files": entry.files,
        "place": str(data / entry.folder) if entry.folder else None,
        "found": None if root is None else str(root),
        "layout": list(entry.layout),
        "notes": list(entry.notes),
    }
