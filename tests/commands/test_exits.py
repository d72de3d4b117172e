"""How a command ends: errors in one sentence, warnings, Ctrl-C, kills and closed pipes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, caller, images

import duallora
from duallora import ContinualLearner
from duallora.cli import main
from duallora.storage import checkpoint

FORK = multiprocessing.get_context("fork")


def test_an_unexpected_error_is_one_sentence_and_a_traceback_only_on_demand(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(checkpoint, "read", fail)
    assert_refused(call("inspect", model), "internal error", "first line second line", code=1)
    monkeypatch.setenv("DUALLORA_DEBUG", "1")
    assert "Traceback" in call("inspect", model).err


def test_a_warning_of_the_package_is_one_plain_line(
    call: Call, model: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = warnings.showwarning
    real = ContinualLearner.evaluate

    def warn(self: ContinualLearner, *args: Any) -> Any:
        place = Path(duallora.__file__).parent / "methods" / "duallora.py"
        warnings.warn_explicit("no direction\nis left", UserWarning, str(place), 1)
        return real(self, *args)

    monkeypatch.setattr(ContinualLearner, "evaluate", warn)
    called = call("evaluate", model, pets)
    assert called.code == 0
    assert called.err.splitlines() == ["duallora: no direction is left"]
    assert warnings.showwarning is shown


def test_an_exhausted_complement_is_said_in_plain_lines(call: Call, pets: Path, tmp_path: Path) -> None:
    words = ["--epochs", 1, "--method.energy_threshold", 1, "--method.residual", "none"]
    said = ""
    for number in range(1, 4):
        called = call("learn", tmp_path / "model", pets, "--name", number, *words)
        assert called.code == 0
        said += called.err
    lines = [line for line in said.splitlines() if "no direction is left" in line]
    assert lines and all(line.startswith("duallora: layer ") for line in lines)
    assert ".py" not in said and "Warning" not in said


ENTRY = "from duallora.cli import main; raise SystemExit(main())"


def _duallora(*words: object, entry: str = ENTRY, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", entry, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **(pipes | settings))


@pytest.mark.process
def test_the_console_entry_teaches_and_predicts(tmp_path: Path) -> None:
    folder = images(tmp_path / "pets", ["cat", "dog"], 3)
    taught = _duallora("learn", tmp_path / "model", folder, "--epochs", 1)
    out, err = taught.communicate()
    assert taught.returncode == 0, err
    assert "2 classes, 6 images" in out
    asked = _duallora("predict", tmp_path / "model", folder, "--json")
    assert len(json.loads(asked.communicate()[0])["predictions"]) == 6
    assert asked.returncode == 0


@pytest.mark.process
def test_ctrl_c_while_learning_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    folder = images(tmp_path / "pets", ["cat", "dog"], 3)
    entry = (
        "from duallora.runtime import progress; progress._SILENCE = -1; "
        "from duallora.cli import main; raise SystemExit(main())"
    )
    words = ["learn", tmp_path / "model", folder, "--epochs", 100_000]
    learning = _duallora(*words, entry=entry)
    # Python loses an interrupt that comes at certain moments of an import: training has to be under way.
    assert learning.stderr is not None and any("epoch 2/" in line for line in learning.stderr)
    learning.send_signal(signal.SIGINT)
    try:
        out, err = learning.communicate(timeout=300)
    finally:
        learning.kill()
    assert (learning.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "duallora: interrupted; every saved file is whole."
    assert "Traceback" not in err
    assert not (tmp_path / "model").exists()


@pytest.mark.process
def test_real_kills_of_a_command_that_learns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Killed at a random moment of the lesson, then just after the first change of the folder."""
    call = caller(capsys)
    model, pets = tmp_path / "model", images(tmp_path / "pets", ["cat", "dog"], 3)
    cars = images(tmp_path / "cars", ["bus", "van"], 3)
    assert call("learn", model, pets, "--epochs", 1).code == 0
    chance = random.Random(0)

    def learn(epochs: int) -> None:
        main(["learn", str(model), str(cars), "--epochs", str(epochs)])
        time.sleep(600)  # to be killed: whoever does so may be late

    for saving in (False, True):
        (model / ".lock").unlink()
        before = sorted([*_names(model), ".lock"])
        learning = FORK.Process(target=learn, args=(1 if saving else 100_000,))
        learning.start()
        try:
            _wait_until((model / ".lock").exists, learning)
            if saving:
                _wait_until(lambda before=before: sorted(_names(model)) != before, learning)
            time.sleep(chance.random() / (500 if saving else 1))
        finally:
            learning.kill()
            learning.join()
        assert learning.exitcode == -signal.SIGKILL
        tasks = [task.name for task in ContinualLearner.load(model, device="cpu").tasks]
        assert tasks in ([["pets"], ["pets", "cars"]] if saving else [["pets"]])
    assert call("learn", model, cars, "--epochs", 1, "--name", "more").code == 0
    after = ContinualLearner.load(model, device="cpu").tasks
    assert [task.name for task in after] == [*tasks, "more"]
    assert not [name for name in _names(model) if name.endswith(".tmp")]


def _wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "it ended before it could be killed"
        time.sleep(0.001)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.process
def test_a_closed_pipe_is_no_error_to_talk_about() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything can be written
    helping = _duallora("--help", stdout=writer)
    os.close(writer)
    assert helping.stderr is not None
    assert (helping.stderr.read(), helping.wait()) == ("", 141)
