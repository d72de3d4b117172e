"""Figures of a training reach the logger that was asked for, and change nothing else."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import Call, assert_refused, images, on_disk

from duallora.errors import DualLoRAError
from duallora.runtime import loggers
from duallora.runtime.loggers import Logging, Recorder
from duallora.runtime.progress import Progress

RUN = ("--tasks", 2, "--epochs", 1, "--device", "cpu", "--seed", 3)


class Noted:
    """Stands for a logger."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.ended: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    images(tmp_path / "stream" / "train", ["a", "b", "c", "d"], 6)
    images(tmp_path / "stream" / "val", ["a", "b", "c", "d"], 3, seed=1)
    return tmp_path / "stream"


def read(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.glob("version_*/metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_figures_of_one_step_are_passed_on_together() -> None:
    made: list[Noted] = []

    def make() -> Noted:
        made.append(Noted())
        return made[-1]

    recorder = Recorder(make)
    progress = Progress(quiet=True, figures=recorder)
    assert progress.recording and not made
    progress.record({"loss": 1.0}, steps=1)
    progress.record({"loss": 0.5}, steps=1)
    progress.record({"accuracy": 0.25})
    progress.record({"loss": 0.4}, steps=1)
    recorder.close("success")
    (logger,) = made
    assert logger.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5, "accuracy": 0.25}), (3, {"loss": 0.4})]
    assert logger.ended == ["success"]


def test_nobody_is_told_where_nothing_is_asked() -> None:
    progress = Progress(quiet=True)
    progress.record({"loss": 1.0}, steps=1)
    assert not progress.recording
    with Logging().recording(Path("nowhere"), {}) as recorder:
        assert recorder is None


def test_a_failure_is_told_to_the_logger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logger = Noted()
    monkeypatch.setattr(loggers, "_make", lambda *_: logger)
    with pytest.raises(KeyError), Logging("csv").recording(tmp_path, {}) as recorder:
        assert recorder is not None
        recorder.take({"loss": 1.0}, 1)
        raise KeyError
    assert logger.logged == [(1, {"loss": 1.0})] and logger.ended == ["failed"]


@pytest.mark.slow
def test_a_run_writes_a_csv_file_and_the_same_results(call: Call, stream: Path, tmp_path: Path) -> None:
    plain = call("run", "--stream", stream, "--out", tmp_path / "plain", *RUN)
    logged = call("run", "--stream", stream, "--out", tmp_path / "logged", "--logger", "csv", *RUN)
    assert plain.code == logged.code == 0, (plain, logged)
    assert not (tmp_path / "plain" / "logs").exists()
    rows = read(tmp_path / "logged" / "logs")
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and len([row for row in rows if row["loss"]]) == len(rows)
    first, second = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("plain", "logged"))
    for key in ("final_accuracy", "config"):
        assert first[key] == second[key]
    last = rows[-1]
    assert float(last["accuracy/calibrated/all seen"]) == pytest.approx(second["final_accuracy"])
    assert {float(row["task"]) for row in rows if row["task"]} == {1, 2}
    assert float(last["rate/heads"]) > 0 and float(last["norm/orthogonal"]) >= 0
    assert last["accuracy/calibrated/task 1"] and last["gate/task 1"]


@pytest.mark.slow
def test_learn_logs_beside_the_model(call: Call, tmp_path: Path) -> None:
    pets, model = images(tmp_path / "pets", ["cat", "dog"], 12), tmp_path / "model"
    words = ("learn", model, pets, "--epochs", 1, "--logger", "csv")
    assert call(*words, "--check", pets).code == 2  # there is no model yet: nothing is left behind
    assert not (tmp_path / "model-logs").exists()
    assert call(*words).code == 0
    assert read(tmp_path / "model-logs")[-1]["accuracy/held back"]
    assert {name.split("/")[0] for name in on_disk(model)} & {"logs", "model-logs"} == set()


@pytest.mark.slow
def test_tensorboard_reads_what_is_written(call: Call, stream: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ("--logger", "tensorboard", "--log-dir", tmp_path / "board")
    assert call("run", "--stream", stream, "--out", tmp_path / "out", *words, *RUN).code == 0
    events = accumulator.EventAccumulator(str(tmp_path / "board" / "version_0"))
    events.Reload()
    assert {"loss", "accuracy/calibrated/all seen", "rate/heads"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("accuracy/calibrated/all seen")) == 2


@pytest.mark.slow
def test_wandb_gets_its_run(
    call: Call, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    codes: list[int] = []

    class Run:
        def log(self, figures: dict[str, float], step: int) -> None:
            logged.append((figures, step))

        def finish(self, exit_code: int) -> None:
            codes.append(exit_code)

    asked: dict[str, Any] = {}
    module = ModuleType("wandb")
    module.__spec__ = sys.__spec__  # as of one that is installed
    module.init = lambda **given: asked.update(given) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert call("run", "--stream", stream, "--out", tmp_path / "o", "--logger", "wandb", *RUN).code == 0
    assert asked["project"] == "duallora" and asked["config"]["method"]["name"] == "duallora"
    assert Path(asked["dir"]) == tmp_path / "o" / "logs"
    steps = [step for _, step in logged]
    assert steps == sorted(set(steps)) and "loss" in logged[0][0]
    assert codes == [0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("verb", ["run", "learn", "compare", "reproduce"])
def test_a_missing_extra_is_named(
    call: Call, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    words = {
        "run": ("run", "--stream", stream, "--out", tmp_path / "o"),
        "learn": ("learn", tmp_path / "o", stream),
        "compare": ("compare", "--stream", stream, "--out", tmp_path / "o", "--methods", "frozen"),
        "reproduce": ("reproduce", "cifar100-10/inflora", "--out", tmp_path / "o"),
    }
    assert_refused(call(*words[verb], "--logger", name), f"{name} is missing", f"'duallora[{name}]'")
    assert not (tmp_path / "o").exists()


def test_wrong_places_are_refused(call: Call, stream: Path, tmp_path: Path) -> None:
    words = ("run", "--stream", stream, "--out", tmp_path / "o")
    assert_refused(call(*words, "--log-dir", tmp_path / "x"), "--log-dir goes with --logger")
    (tmp_path / "file").write_text("")
    assert_refused(call(*words, "--logger", "csv", "--log-dir", tmp_path / "file"), "is a file")
    assert_refused(call(*words, "--logger", "paper"), "csv")
    with pytest.raises(DualLoRAError, match="--logger"):
        Logging("none", tmp_path).check()


def test_compare_gives_each_run_its_own_folder(
    call: Call, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duallora.commands import compare

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(compare, "run_jobs", lambda jobs, *_: asked.extend(j.words for j in jobs) or [])
    words = (
        "compare",
        "--stream",
        stream,
        "--out",
        tmp_path / "o",
        "--methods",
        "frozen,duallora",
        "--tasks",
        2,
    )
    called = call(*words, "--device", "cpu", "--logger", "csv", "--log-dir", tmp_path / "logs")
    assert called.code == 0, called
    folders = [one[one.index("--log-dir") + 1] for one in asked]
    assert folders == [str(tmp_path / "logs" / name) for name in ("frozen-0", "duallora-0")]
    assert all(one[one.index("--logger") + 1] == "csv" for one in asked)
