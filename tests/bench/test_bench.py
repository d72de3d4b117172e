"""``duallora bench`` writes what it says, from real measurements of a tiny backbone."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from command_line import Call, assert_refused, caller, use_tiny_backbone
from tiny import tiny_backbone

from duallora.bench.counts import held_bytes, peak_bytes
from duallora.bench.timing import medians

CPU = torch.device("cpu")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", lambda *_, **__: tiny_backbone())
    monkeypatch.setattr("duallora.bench.timing.SHORTEST", 0.0)
    return caller(capsys)


@pytest.mark.slow
def test_a_measurement_is_written(call: Call, tmp_path: Path) -> None:
    words = ["--methods", "lora,duallora,joint,ncm", "--tasks", "1,2", "--batch", "1,3", "--classes", 2]
    words += ["--images", 8, "--training-batch", 4, "--repeats", 1, "--device", "cpu"]
    called = call("bench", "--out", tmp_path / "bench", *words)
    assert called.code == 0, called
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert set(found) == {"rows", "environment"}
    rows = {(row["method"], row["tasks"], row["batch"]): row for row in found["rows"]}
    names = ("backbone", "lora", "duallora", "joint", "ncm")
    assert set(rows) == {(name, tasks, batch) for name in names for tasks in (1, 2) for batch in (1, 3)}
    for (name, tasks, _), row in rows.items():
        assert row["prediction_seconds"] > 0 and row["images_per_second"] > 0
        assert row["prediction_peak_bytes"] > 0 and row["flops_per_image"] > 0
        assert (row["prediction_ratio"] == 1) == (name == "backbone")
        assert ("training_seconds" in row) == (name in ("lora", "duallora", "joint"))
        if name == "backbone":
            continue
        assert row["stored_bytes"] > 0 and row["task_images"] >= 4
        assert (
            row["data_passes"]
            == row["backbone_passes"]
            == {"lora": 1, "duallora": 2, "joint": 2, "ncm": 1}[name]
        )
        assert (row["stored_bytes_per_task"] is None) == (tasks == 1 or name == "joint")
    assert rows["lora", 1, 1]["training_ratio"] == 1
    with (tmp_path / "bench" / "bench.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "time x backbone" in called.out and "time x lora" in called.out
    assert_refused(call("bench", "--out", tmp_path / "bench"), "already", "another folder")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--tasks", "one"], ["--tasks", "numbers"]),
        (["--batch", "0"], ["--batch", "from 1"]),
        (["--methods", "larger"], ["no method larger"]),
        (["--exports", "pickle"], ["--exports", "onnx"]),
        (["--repeats", "0"], ["--repeats"]),
    ],
)
def test_wrong_words_are_refused(call: Call, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    assert_refused(call("bench", "--out", tmp_path / "x", *words), *parts)
    assert not (tmp_path / "x").exists()


def test_medians_are_of_every_call() -> None:
    calls = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.2)}
    found = medians(calls, CPU, 3, shortest=0.0)
    assert 0.001 <= found["short"] < found["long"]


def test_held_bytes_count_shared_memory_once() -> None:
    x = torch.zeros(10, 4)
    assert held_bytes([x, x.T, {"a": (x[0],)}], device=CPU) == 160
    assert held_bytes(x, torch.zeros(3), device=CPU) == 172


def test_peak_bytes_are_the_most_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.zeros(1000, 1000)

    assert 4_000_000 <= peak_bytes(work, CPU) < 4_100_000
