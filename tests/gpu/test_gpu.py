"""A GPU learns and answers as the CPU does, in every precision, compiled or not, and survives an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Called, caller, images, use_tiny_backbone
from small_tasks import small_config, taught, three_tasks
from tiny import tiny_backbone, tiny_images

from duallora import METHODS, ContinualLearner
from duallora.errors import DualLoRAError
from duallora.outputs import Outputs
from duallora.runtime.compute import Compute, Machine

TOLERANCE = 5e-3  # of probabilities


def machine(device: str, precision: Any = "32", **options: Any) -> Machine:
    return Compute(device, precision=precision, **options).start()  # type: ignore[arg-type]


def learner(name: str, on: Machine, **changes: Any) -> ContinualLearner:
    made = ContinualLearner(tiny_backbone(), small_config(name, **changes), device=on)
    for task in taught(name, three_tasks()):
        made.learn(task)
    return made


def asked(of: ContinualLearner, batch: torch.Tensor) -> Outputs:
    return of.outputs_of([batch])


def assert_alike(found: Outputs, expected: Outputs, tolerance: float = TOLERANCE) -> None:
    for name in ("heads", "calibrated", "task_posterior"):
        a, b = getattr(found, name), getattr(expected, name)
        if b is not None:
            torch.testing.assert_close(a.exp(), b.exp(), rtol=0, atol=tolerance)
            assert torch.equal(a.argmax(1), b.argmax(1)) or _close_calls(b, tolerance)
    torch.testing.assert_close(found.familiarity, expected.familiarity, rtol=0, atol=tolerance)


def _close_calls(logs: torch.Tensor, tolerance: float) -> bool:
    """Whether some image's two best answers are nearer than the tolerance, so that either may win."""
    best = logs.exp().topk(2, dim=1).values
    return bool((best[:, 0] - best[:, 1] < 2 * tolerance).any())


@pytest.mark.parametrize("way", ["to the device", "from the device"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_alike_on_both(name: str, way: str, device: str, tmp_path: Path) -> None:
    """Learned and saved on one, loaded on the other."""
    here, there = ("cpu", device) if way == "to the device" else (device, "cpu")
    made = learner(name, machine(here))
    made.save(tmp_path / "model")
    again = ContinualLearner.load(tmp_path / "model", device=machine(there), backbone=tiny_backbone())
    assert_alike(asked(again, tiny_images(24)), asked(made, tiny_images(24)))


@pytest.mark.parametrize("name", METHODS)
def test_an_answer_does_not_depend_on_the_batch(name: str, device: str) -> None:
    made = learner(name, machine(device))
    batch = tiny_images(64)
    single = made.outputs_of(batch.split(1))
    assert_alike(single, asked(made, batch), tolerance=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["duallora", "lora", "inflora"])
def test_reduced_precision_learns_what_fp32_learns(name: str, precision: str, device: str) -> None:
    if precision == "16-mixed" and device != "cuda":
        pytest.skip("only a CUDA device has this")
    made = learner(name, machine(device, precision))
    outputs = asked(made, tiny_images(16))
    assert all(torch.isfinite(x).all() for x in (outputs.heads, outputs.features, outputs.familiarity))
    plain = learner(name, machine(device))
    accuracy = [sum(x.evaluate(task).accuracy for task in three_tasks()) / 3 for x in (made, plain)]
    assert accuracy[0] > accuracy[1] - 0.1
    difference = outputs.heads.exp() - asked(plain, tiny_images(16)).heads.exp()
    assert float(difference.abs().mean()) < 0.05


@pytest.mark.parametrize("residual", ["none", "own"])
def test_compiled_is_as_written(residual: str, device: str) -> None:
    plain = learner("duallora", machine(device), residual=residual)
    compiled = learner("duallora", machine(device, compile=True), residual=residual)
    assert compiled.backbone.compiled  # no compiler has failed
    for size in (1, 5, 24):
        assert_alike(asked(compiled, tiny_images(size)), asked(plain, tiny_images(size)))


def _run(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "duallora", "run", *words, "--out", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_a_killed_run_goes_on(device: str, tmp_path: Path) -> None:
    words = ["--stream", "digits", "--tasks", "2", "--train-per-class", "6", "--method", "duallora"]
    words += ["--method.epochs", "1", "--device", device, "--precision", "32"]
    with _run(words, tmp_path / "whole") as whole:
        assert whole.wait() == 0, whole.stderr and whole.stderr.read()
    with _run(words, tmp_path / "killed") as killed:
        while killed.poll() is None and not (tmp_path / "killed" / "progress.json").exists():
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
    with _run(words, tmp_path / "killed") as again:
        assert again.wait() == 0, again.stderr and again.stderr.read()
    found, expected = (
        json.loads((tmp_path / name / "results.json").read_text())["accuracy_matrix"]
        for name in ("killed", "whole")
    )
    assert found == pytest.approx(expected, abs=0.02) if device == "cuda" else found == expected


def test_too_large_a_batch_is_one_sentence_and_loses_nothing(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_backbone(monkeypatch)
    call, model = caller(capsys), tmp_path / "model"
    first, second = (images(tmp_path / name, [f"{name} a", f"{name} b"]) for name in ("one", "two"))
    assert call("learn", model, first, "--device", device, "--epochs", 1).code == 0
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}

    def exhausted(*_: object) -> None:
        if device == "cuda":
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("duallora.training._gradients", exhausted)
    called: Called = call("learn", model, second, "--device", device, "--epochs", 1)
    assert called.code == DualLoRAError.exit_code
    *before_it, sentence = called.err.strip().splitlines()
    assert "--method.batch_size" in sentence and "--accumulate" in sentence
    assert all("no direction is left" in line for line in before_it)
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
