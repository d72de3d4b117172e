"""What a new process has to import: seconds of a command are imports, and one too many is soon written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from duallora.backbones.backbone import load_backbone
from duallora.bench import startup as module
from duallora.bench.candidates import Candidate
from duallora.bench.startup import startup
from duallora.bench.synthetic import simulated_learner
from duallora.methods import METHODS

pytestmark = pytest.mark.process

_PREDICTIONS = """
import sys, torch
from duallora import ContinualLearner
for folder in sys.argv[1:]:
    ContinualLearner.load(folder, device="cpu").predict([torch.zeros(3, 64, 64)])
"""
_HELP = "from duallora.cli import main; main(sys.argv[1:])"


def imported(script: str, *words: str) -> set[str]:
    """Top-level modules that a new process holds at its end."""
    end = "\nprint('|'.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + script + end, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split("|"))


@pytest.mark.parametrize("words", [("--help",), ("predict", "--help"), ("serve", "--help")], ids=" ".join)
def test_help_waits_for_no_library(words: tuple[str, ...]) -> None:
    assert imported(_HELP, *words) & {"torch", "timm", "numpy", "lightning_fabric"} == set()


def test_a_prediction_imports_neither_what_trains_nor_what_measures(tmp_path: Path) -> None:
    """Of one method and of another: what either imports is there at the end of the process."""
    folders = [tmp_path / method for method in ("duallora", "ranpac")]
    for folder in folders:
        config = METHODS[folder.name].config()
        simulated_learner(load_backbone("embedded"), config, tasks=2, classes=2).save(folder)
    found = imported(_PREDICTIONS, *map(str, folders))
    assert {"torch", "timm", "duallora"} <= found
    assert found & {"lightning_fabric", "torchmetrics", "sklearn", "jsonargparse", "matplotlib"} == set()


def test_processes_are_timed_in_turn_but_for_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = module._seconds, []

    def seconds(script: str, words: list[str]) -> float:
        started.append(script)
        return 1e6 if len(started) <= 3 else real(script, words)

    monkeypatch.setattr(module, "_seconds", seconds)
    found = startup(Candidate("duallora", METHODS["duallora"].config()), tasks=2, classes=2, repeats=1)
    assert len(started) == 6 and started[:3] == started[3:]
    assert all(0 < found[f"{name}_seconds"] < 1e6 for name in ("frozen", "learned", "help"))
    assert found["load_ratio"] == pytest.approx(found["learned_seconds"] / found["frozen_seconds"])
