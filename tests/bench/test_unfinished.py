"""A measurement that was ended goes on with what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, caller
from tiny import tiny_backbone

from duallora.bench import measure
from duallora.bench.unfinished import FILE, Unfinished
from duallora.errors import DualLoRAError
from duallora.runtime.progress import Progress

QUIET = Progress(quiet=True)


def test_a_part_is_measured_once_and_written_at_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def measured(name: str) -> list[dict[str, Any]]:
        calls.append(name)
        return [{"figure": (1, 2), "nan": float("nan")}]

    expected = [{"figure": [1, 2], "nan": None}]
    first = Unfinished(tmp_path / "new", {"tasks": (1, 2)}, QUIET)
    assert first.measured("a", lambda: measured("a")) == expected
    assert json.loads((tmp_path / "new" / FILE).read_text())["parts"] == {"a": expected}
    again = Unfinished(tmp_path / "new", {"tasks": (1, 2)}, QUIET)
    assert again.measured("a", lambda: measured("a")) == expected
    again.measured("b", lambda: measured("b"))
    assert calls == ["a", "b"]
    again.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_parts_of_another_measurement_are_refused(tmp_path: Path) -> None:
    Unfinished(tmp_path, {"tasks": [1]}, QUIET).measured("a", dict)
    with pytest.raises(DualLoRAError, match="parts of another measurement; delete"):
        Unfinished(tmp_path, {"tasks": [2]}, QUIET)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DualLoRAError, match="cannot be read; delete it"):
        Unfinished(tmp_path, {"tasks": [1]}, QUIET)


@pytest.mark.slow
def test_the_command_goes_on_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", lambda *_, **__: tiny_backbone())
    monkeypatch.setattr("duallora.bench.timing.SHORTEST", 0.0)
    call, out = caller(capsys), tmp_path / "bench"
    words = ["--methods", "lora,ncm", "--tasks", "1,2", "--batch", "1,3", "--classes", 2, "--repeats", 1]
    words += ["--images", 8, "--training-batch", 4, "--device", "cpu", "--out", out]
    batch, done = measure.Bench._batch, list[tuple[int, int]]()

    def noted(self: measure.Bench, tasks: int, size: int, filled: Any) -> Any:
        if len(done) == 2:
            done.append((0, 0))
            raise KeyboardInterrupt
        done.append((tasks, size))
        return batch(self, tasks, size, filled)

    monkeypatch.setattr(measure.Bench, "_batch", noted)
    assert call("bench", *words).code == 130
    assert set(json.loads((out / FILE).read_text())["parts"]) == {
        "1 task, training",
        "1 task, batch 1",
        "1 task, batch 3",
        "2 tasks, training",
    }
    assert_refused(call("bench", *words, "--classes", 3), "parts of another measurement")
    called = call("bench", *words)
    assert called.code == 0, called
    assert done == [(1, 1), (1, 3), (0, 0), (2, 1), (2, 3)]
    assert "4 parts are there already" in called.err
    assert len(json.loads((out / "bench.json").read_text())["rows"]) == 3 * 2 * 2
    assert not (out / FILE).exists()
