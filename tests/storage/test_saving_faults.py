"""Whatever interrupts a save, a lesson or a run: the old or the new state is there, and work goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from PIL import Image
from small_tasks import Patterns, new_learner, small_config, three_tasks
from tiny import tiny_backbone

import duallora.learner
from duallora import ContinualLearner, DualLoRAError
from duallora.cli import main as command_line
from duallora.runs import report, results
from duallora.runs.results import MEASURED
from duallora.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]

FORK = multiprocessing.get_context("fork")
STATES = dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def generations() -> tuple[ContinualLearner, ContinualLearner]:
    """The same learner after one task and after two; the tests only save them."""
    first, second = new_learner(), new_learner()
    for learner, tasks in ((first, 1), (second, 2)):
        for task in three_tasks()[:tasks]:
            learner.learn(task)
    return first, second


def tasks_in(folder: Path, generations: tuple[ContinualLearner, ContinualLearner]) -> int:
    """Number of tasks of the saved learner, which must be one of the two, to the last bit."""
    loaded = ContinualLearner.load(folder, device="cpu", backbone=tiny_backbone())
    expected = generations[len(loaded.tasks) - 1]
    assert loaded.tasks == expected.tasks and loaded.classes == expected.classes
    found, state = loaded.method.state(), expected.method.state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], x) for name, x in state.items())
    return len(loaded.tasks)


def assert_clean(folder: Path) -> None:
    """Nothing is there that neither generation names."""
    manifest = checkpoint.read_manifest(folder)
    named = {*manifest["files"], *(manifest["previous"] or {"files": {}})["files"]}
    assert {path.name for path in folder.iterdir()} == named | {"model.json", ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_fault_at_every_file_operation_of_a_save(
    kind: faults.Kind, generations: tuple[ContinualLearner, ContinualLearner], tmp_path: Path
) -> None:
    first, second = generations
    first.save(tmp_path / "start")
    seen = []
    for trial in faults.sweep(tmp_path / "start", tmp_path / "trials", second.save, kind):
        if trial.operation is None:
            assert trial.error is None
        elif kind.startswith("full"):
            # A file that could not be deleted afterwards is no reason to complain.
            assert trial.error is None or isinstance(trial.error, DualLoRAError), trial
        elif kind.startswith("interrupt"):
            assert trial.error is None or isinstance(trial.error, KeyboardInterrupt), trial
        seen.append(tasks_in(trial.folder, generations))
        if trial.error is None:
            assert seen[-1] == 2, trial
        second.save(trial.folder)  # the learner in memory has lost nothing
        assert tasks_in(trial.folder, generations) == 2, trial
        assert_clean(trial.folder)
        checkpoint.undo(trial.folder)
        assert tasks_in(trial.folder, generations) == 1, trial
    assert len(seen) > 8 and seen == sorted(seen) and set(seen) == {1, 2}, seen


@pytest.mark.parametrize("kind", ["full", "interrupt", "crash", "reorder"])
def test_a_fault_in_a_first_save(
    kind: faults.Kind, generations: tuple[ContinualLearner, ContinualLearner], tmp_path: Path
) -> None:
    first, _ = generations
    for trial in faults.sweep(None, tmp_path, first.save, kind):
        if (trial.folder / "model.json").exists():
            assert tasks_in(trial.folder, generations) == 1, trial
        else:
            assert trial.error is not None
            with pytest.raises(DualLoRAError, match="no saved model"):
                ContinualLearner.load(trial.folder, backbone=tiny_backbone())
        first.save(trial.folder)
        assert tasks_in(trial.folder, generations) == 1, trial
        assert_clean(trial.folder)


@pytest.mark.parametrize("kind", ["full", "interrupt", "interrupt_after"])
def test_a_save_can_be_repeated_where_the_learner_came_from(kind: faults.Kind, tmp_path: Path) -> None:
    """Also when the first attempt had reached the disk already: that is no change by someone else."""
    start = new_learner(small_config("linear"))
    start.learn(three_tasks(2)[0])
    start.save(tmp_path / "start")
    learners: list[ContinualLearner] = []

    def learn(folder: Path) -> None:
        learners.append(ContinualLearner.load(folder, device="cpu", backbone=tiny_backbone()))
        learners[-1].learn(three_tasks(2)[1])
        learners[-1].save(folder)

    refused = []
    for trial in faults.sweep(tmp_path / "start", tmp_path / "trials", learn, kind):
        try:
            learners[-1].save(trial.folder)
        except DualLoRAError as error:
            refused.append(f"{trial.operation}: {error}")
        assert len(checkpoint.read_manifest(trial.folder)["tasks"]) == 2, trial
    assert not refused, refused


@pytest.mark.process
def test_real_kills_of_a_process_that_saves(
    generations: tuple[ContinualLearner, ContinualLearner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two learners in turn stand for one that learns for ever; each would refuse what the other has saved.
    commit = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda *a, replaces=None, **k: commit(*a, **k))
    first, second = generations
    folder = tmp_path / "model"
    first.save(folder)

    def save_for_ever() -> None:
        while True:
            second.save(folder)
            first.save(folder)

    for seed in range(2):
        process = FORK.Process(target=save_for_ever)
        process.start()
        time.sleep(0.3 + random.Random(seed).random() / 5)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert tasks_in(folder, generations) in (1, 2)
        second.save(folder)  # the lock has died with the process
        assert tasks_in(folder, generations) == 2
        assert_clean(folder)


# --- duallora learn ---


@pytest.fixture
def tiny_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands load a tiny backbone, whatever its name; plots and timings are left out."""
    monkeypatch.setattr(duallora.learner, "load_backbone", lambda *_: tiny_backbone())
    monkeypatch.setattr(report, "accuracy_plot", lambda _: b"a plot")
    monkeypatch.setattr(results, "_SPEED_IMAGES", 4)
    yield


def write_folder(folder: Path, data: Patterns) -> None:
    for i, (image, target) in enumerate(data):
        path = folder / data.classes[target] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def run_command(*arguments: str | Path) -> int:
    """Exit code of ``duallora ...`` in this process; interruptions pass through."""
    try:
        code = command_line([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return int(code or 0)


def tasks_of(folder: Path) -> list[str]:
    learner = ContinualLearner.load(folder, device="cpu")
    learner.predict(three_tasks()[0].images[:2])
    return [task.name for task in learner.tasks]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_everywhere")
@pytest.mark.parametrize("kind", ["full", "interrupt_after", "crash", "reorder"])
def test_a_fault_at_every_file_operation_of_a_lesson(kind: faults.Kind, tmp_path: Path) -> None:
    for task, name in zip(three_tasks(2), ("one", "two", "three"), strict=True):
        write_folder(tmp_path / name, task)
    learn = ["learn", "--device", "cpu", "--method.epochs", "1", "--method.batch_size", "8"]
    assert run_command(*learn, tmp_path / "start", tmp_path / "one", "--method", "linear") == 0
    assert tasks_of(tmp_path / "start") == ["one"]
    seen = []
    for trial in faults.sweep(
        tmp_path / "start",
        tmp_path / "trials",
        lambda model: run_command(*learn, model, tmp_path / "two"),
        kind,
    ):
        known = tasks_of(trial.folder)
        assert known in (["one"], ["one", "two"]), trial
        seen.append(len(known))
        if trial.error is None and trial.result == 0:
            assert len(known) == 2, trial
        elif kind == "full":
            assert trial.result == 2, trial
        elif kind == "interrupt_after":
            assert trial.result == 130 or isinstance(trial.error, KeyboardInterrupt), trial
        assert run_command(*learn, trial.folder, tmp_path / "three") == 0  # learning goes on
        assert tasks_of(trial.folder) == [*known, "three"], trial
        assert_clean(trial.folder)
    assert len(seen) > 8 and seen == sorted(seen) and set(seen) == {1, 2}, seen


# --- duallora run ---


def comparable(value: Any) -> Any:
    """Results without what is measured with a clock or a memory counter."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in MEASURED}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value


def run_until(tasks: int, out: Path) -> None:
    """The run, which waits to be killed before its next task: whoever kills it may be late."""
    learn = ContinualLearner.learn

    def waiting(learner: ContinualLearner, *given: Any, **named: Any) -> Any:
        if len(learner.tasks) == tasks:
            time.sleep(600)
        return learn(learner, *given, **named)

    ContinualLearner.learn = waiting  # type: ignore[method-assign]  # of the forked process
    sys.exit(run_command(*RUN, "--out", out))


RUN = [
    *("run", "--stream", "digits", "--tasks", "3", "--classes", "6", "--train-per-class", "4"),
    *("--holdout", "3", "--method.epochs", "1", "--method.batch_size", "8", "--device", "cpu"),
]


def learned_tasks(out: Path) -> int:
    try:
        return len(json.loads((out / "model" / "model.json").read_text())["tasks"])
    except FileNotFoundError:
        return 0


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "the run ended before it could be killed"
        time.sleep(0.002)


@pytest.mark.process
def test_real_kills_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on the embedded backbone, killed after its first and after its second task."""
    monkeypatch.setattr(results, "_SPEED_IMAGES", 4)
    monkeypatch.setattr(report, "accuracy_plot", lambda _: b"a plot")
    assert run_command(*RUN, "--out", tmp_path / "whole") == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    killed = tmp_path / "killed"
    for tasks in (1, 2):
        process = FORK.Process(target=run_until, args=(tasks, killed))
        process.start()
        try:
            wait_for(lambda tasks=tasks: learned_tasks(killed) == tasks, process)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "results.json").exists()
        assert len(ContinualLearner.load(killed / "model").tasks) == tasks
    assert run_command(*RUN, "--out", killed) == 0
    figures = json.loads((killed / "results.json").read_text())
    assert comparable(figures) == comparable(whole)
    predictions = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("whole", "killed")]
    assert predictions[0] == predictions[1]
