"""The tutorials: every block runs as it stands, in the order of the page.

Commands of the research tutorial are followed by options that make them small, and the runs that `compare`
starts are made in this process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from page_blocks import Block, Terminal, blocks, commands, missing, run_python

from duallora import METHODS
from duallora.cli import main
from duallora.commands.subprocess_jobs import Job

DOCS = Path(__file__).resolve().parents[2] / "docs"
FEW = ["--train-per-class", "4", "--holdout", "4", "--classes", "4", "--tasks", "2"]
SMALLER = ["--epochs", "1", *FEW]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal in an empty folder."""
    monkeypatch.chdir(tmp_path)
    opened = Terminal()
    yield opened
    opened.close()


def follow(page: Path, terminal: Terminal) -> list[Block]:
    """Does what a page says and returns its blocks.

    It is an error when a line of output does not come, or when a command fails and the page does not ask for
    its exit code with ``echo $?``.
    """
    for block in blocks(page):
        if block.language == "python":
            run_python(block, page)
        asked = list(commands(block)) if block.language == "console" else []
        for number, (line, expected) in enumerate(asked):
            printed = terminal.run(line)
            assert missing(expected, printed) == [], f"$ {line}\n{printed}"
            told = any(later == "echo $?" for later, _ in asked[number:])
            assert told or terminal.code == 0, f"$ {line}\n{printed}"
    return blocks(page)


@pytest.mark.process
def test_the_tutorial(terminal: Terminal) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    follow(DOCS / "tutorial.md", terminal)
    model = json.loads(Path("numbers/model.json").read_text())
    assert [task["name"] for task in model["tasks"]] == ["first", "second"]
    assert model["tasks"][1]["classes"] == ["three"]


def test_the_tutorial_for_research(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duallora.runs.results._SPEED_IMAGES", 8)
    monkeypatch.setattr("duallora.runs.results._SPEED_REPEATS", 1)
    monkeypatch.setattr("duallora.commands.compare.run_jobs", in_process)
    terminal.change = lambda words: [*words, *SMALLER]
    try:
        found = follow(DOCS / "tutorial-research.md", terminal)
    finally:
        METHODS.pop("shrinking", None)
    page = Path("runs/compared/compare.md").read_text()
    assert all(name in page for name in ("duallora", "frozen", "joint", "shrinking"))
    (script,) = (block.text for block in found if block.language == "bash")
    asked = array_commands(script, number=1)
    assert [words[words.index("--method") + 1] for words in asked] == ["duallora", "frozen", "joint"]
    assert main([*asked[1], *SMALLER]) == 0
    assert Path("runs/compared/runs/frozen-1/results.json").exists()


def in_process(jobs: Sequence[Job], *_: object) -> list[Job]:
    """Stands for the processes that `compare` starts; gives the jobs that failed."""
    return [job for job in jobs if main(list(job.words)) != 0]


def array_commands(script: str, number: int) -> list[list[str]]:
    """The words of every `duallora` command that one job of a Slurm array runs."""
    told = 'duallora() { printf "%s\\\\n" "$@"; echo; }\n' + script
    environment = {"SLURM_ARRAY_TASK_ID": str(number), "PATH": ""}
    done = subprocess.run(
        ["/bin/bash", "-c", told], capture_output=True, text=True, check=True, env=environment
    )
    found = [part.splitlines() for part in done.stdout.split("\n\n") if part.strip()]
    assert found and not done.stderr
    return found
