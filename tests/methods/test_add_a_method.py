"""The example of docs/add-a-method.md: what stands there is a method, with nothing added."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import caller
from small_tasks import assert_same_outputs, new_learner, reloaded, small_config, three_tasks, unseen

from duallora import METHODS
from duallora.methods import entry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"


def block(marker: str) -> str:
    """The code block after a marker of the page."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, f"{PAGE} has no block {marker}"
    return found[1]


@pytest.fixture
def anchored(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, place = re.fullmatch(r'\s*"(\S+)": "(\S+)",\s*', block("registry line")).groups()  # type: ignore[union-attr]
    module = ModuleType(f"duallora.methods.{place.split('.')[0]}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block("anchored.py"), str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, name, entry(place))
    yield name


def test_the_example_learns_saves_and_goes_on(anchored: str, tmp_path: Path) -> None:
    tasks, data = three_tasks(), unseen(three_tasks())
    whole, first = new_learner(small_config(anchored)), new_learner(small_config(anchored))
    for task in tasks:
        whole.learn(task)
    first.learn(tasks[0])
    resumed = reloaded(first, tmp_path / "model")
    for task in tasks[1:]:
        resumed.learn(task)
    assert_same_outputs(resumed.outputs(data), whole.outputs(data))
    images = [data[i][0] for i in range(3)]
    assert resumed.predict(images) == whole.predict(images)


def test_the_anchor_holds(anchored: str) -> None:
    def moved(strength: float) -> float:
        learner = new_learner(small_config(anchored, strength=strength))
        learner.learn(three_tasks()[0])
        before = [p.clone() for p in learner.method.adapters.parameters()]
        learner.learn(three_tasks()[1])
        now = learner.method.adapters.parameters()
        return sum(float((a - b).detach().square().sum()) for a, b in zip(now, before, strict=True))

    free, held, fixed = moved(0.0), moved(1.0), moved(1e3)
    assert free > 1.2 * held > 1.2 * fixed > 0


def test_the_commands_know_the_example(
    anchored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duallora.runs.results._SPEED_IMAGES", 4)
    call = caller(capsys)
    listed = json.loads(call("methods", "--json").out)
    assert listed[-1]["name"] == anchored and listed[-1]["paper"]
    assert "--method.strength" in call("run", "--method", anchored, "--help").out
    words = "--stream digits --classes 4 --tasks 2 --train-per-class 3 --holdout 3 --epochs 1"
    words += f" --method.strength 2 --out {tmp_path}/run"
    call("run", "--method", anchored, *words.split())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["method"]["name"] == anchored
    assert results["config"]["method"]["strength"] == 2.0
    assert torch.tensor(results["final_accuracy"]).isfinite()
