"""Comparisons in one process, and what is read from their folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import use_tiny_backbone

from duallora.cli import main
from duallora.commands import compare as compare_module
from duallora.commands.subprocess_jobs import Job
from duallora.runs.results import MEASURED

SMALL = ["--classes", "4", "--tasks", "2", "--train-per-class", "6", "--holdout", "3", "--device", "cpu"]


BUDGET = ["--same-budget", "--epochs", "1"]


Started = list[str]


def in_process(started: Started) -> Callable[..., list[Job]]:
    """Stands for the processes: the same command lines, one after another, in this one."""

    def run(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], *_: object) -> list[Job]:
        failed = []
        for job in jobs:
            started.append(job.name)
            if main(list(job.words)):
                failed.append(job)
        return failed

    return run


def quick(patch: pytest.MonkeyPatch) -> Started:
    """A tiny backbone, no processes, no pictures of single runs and little to time; says what was started."""
    started: Started = []
    use_tiny_backbone(patch)
    patch.setattr(compare_module, "run_jobs", in_process(started))
    patch.setattr("duallora.runs.report.accuracy_plot", lambda _: None)
    patch.setattr("duallora.runs.comparison_page.plot", lambda _: None)
    patch.setattr("duallora.runs.results._SPEED_IMAGES", 4)
    return started


def words_of(folder: Path, methods: str, *files: Path, seeds: str = "0,1") -> list[str]:
    names = ",".join([methods, *map(str, files)])
    return ["compare", "--methods", names, "--seeds", seeds, "--out", str(folder / "out"), *SMALL, *BUDGET]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read(path)
    change(content)
    path.write_text(json.dumps(content))


def stamps_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def comparable(value: Any) -> Any:
    """The same without what a clock or the memory gave."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in MEASURED}
    return [comparable(item) for item in value] if isinstance(value, list) else value


def order_of(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["line"] for row in rows))
