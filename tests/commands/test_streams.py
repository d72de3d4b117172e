"""``duallora streams``: the list, one stream in detail, and what the documentation says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from stream_fixtures import counts, save, write_core50, write_table

from duallora.commands.streams import streams
from duallora.errors import DualLoRAError
from duallora.streams import STREAMS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "streams.md"


def test_the_list_names_every_stream_and_where_its_files_go(capsys: pytest.CaptureFixture[str]) -> None:
    streams(data=Path("sets"))
    shown = capsys.readouterr().out
    for name, entry in STREAMS.items():
        assert name in shown
        assert not entry.folder or str(Path("sets") / entry.folder) in shown


@pytest.mark.parametrize("name", list(STREAMS))
def test_one_stream_says_what_to_fetch_and_how_it_lies(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    streams(name)
    shown = capsys.readouterr().out
    entry = STREAMS[name]
    for text in (entry.summary, entry.files, entry.page, *entry.layout, *entry.notes):
        assert text in shown
    assert bool(entry.folder) == bool(entry.files) == bool(entry.places) == ("files go to" in shown)
    assert entry.layout or "come with scikit-learn" in shown


def test_it_says_whether_the_files_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streams("core50", data=tmp_path)
    assert "found: no" in capsys.readouterr().out
    write_core50(tmp_path)
    streams("core50", data=tmp_path)
    assert f"found: yes, in {tmp_path / 'core50' / 'core50_128x128'}" in capsys.readouterr().out


def test_json_is_one_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    streams(json=True, data=tmp_path)
    every = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in every] == list(STREAMS)
    streams("domainnet", json=True, data=tmp_path)
    one = json.loads(capsys.readouterr().out)
    assert one == next(entry for entry in every if entry["name"] == "domainnet")
    assert (one["scenario"], one["found"], one["place"]) == ("domain", None, str(tmp_path / "domainnet"))


def test_prefixes_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    streams("hf")
    assert "duallora[hf]" in capsys.readouterr().out
    with pytest.raises(DualLoRAError, match="there is no stream core51; did you mean core50"):
        streams("core51")


def test_the_documentation_names_every_stream() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    assert rows >= set(STREAMS)


def test_the_table_of_the_documentation_is_read(tmp_path: Path) -> None:
    from duallora.streams import load

    found = re.search(r"```text\n(path,label.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    header, *rows = [line.split(",") for line in found[1].splitlines()]
    for number, (path, *_) in enumerate(rows):
        save(tmp_path / path, number)
    stream = load(str(write_table(tmp_path / "tools.csv", header, rows)))
    assert [task.name for task in stream] == ["workshop", "kitchen"]
    assert sum(counts(stream)) == len(rows)
