"""Kills of `forget`, `undo` and `export`, and of `serve` while the model that it serves is taught."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from killing import Tally, answers, attempt, complete, generation, kill, start

_LEARN = ["--epochs", "1", "--device", "cpu"]


def kill_forget(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills the forgetting of a class."""
    command = ["forget", "model", "--class", "dog", "--device", "cpu"]
    return _kill_change("forget", command, kills, _two_tasks(data, work / "forget"), images, rng)


def kill_undo(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills the step back of a model."""
    return _kill_change("undo", ["undo", "model"], kills, _two_tasks(data, work / "undo"), images, rng)


def kill_export(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills the writing of a model as one file."""
    old = _two_tasks(data, work / "export")
    command = ["export", "model", "--out", "model.pt2"]
    seconds = complete(command, old)
    (old / "model.pt2").unlink()
    before = answers(old / "model", images)
    print(f"export: {seconds:.1f} s without a kill", flush=True)
    tally = Tally({}, [])
    for number in range(kills):
        folder = work / f"export-{number}"
        shutil.copytree(old, folder)
        running = kill(command, folder, folder, seconds, 2, rng)
        outcome, loss = attempt(partial(_exported, folder))
        if loss is None and answers(folder / "model", images) != before:
            loss = "the model was changed"
        if loss is None and number == kills - 1:
            loss = _no_leftovers(command, folder)
        tally.add(f"export: {'killed' if running else 'had ended'}, {outcome}", loss)
        shutil.rmtree(folder)
    return tally


def kill_serve(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills a server about when it takes a new generation of its model."""
    old = work / "serve"
    old.mkdir()
    complete(["learn", "model", str(data / "first"), *_LEARN], old)
    learn = ["learn", "model", str(data / "second"), *_LEARN]
    tally = Tally({}, [])
    for number in range(kills):
        folder = work / f"serve-{number}"
        shutil.copytree(old, folder)
        server = start(["serve", "model", "--port", "0", "--device", "cpu"], folder)
        _wait_for_line(folder / "output.txt")
        complete(learn, folder)
        expected = {"new": answers(folder / "model", images)}
        time.sleep(rng.uniform(0, 3))
        running = server.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        outcome, loss = attempt(partial(generation, folder / "model", images, expected))
        if loss is None and not running:
            loss = f"the server had ended by itself:\n{(folder / 'output.txt').read_text()[-2000:]}"
        tally.add(f"serve: killed, model is {outcome}", loss)
        shutil.rmtree(folder)
    return tally


def _two_tasks(data: Path, folder: Path) -> Path:
    """A folder with a model that knows both folders of images."""
    folder.mkdir()
    for part in ("first", "second"):
        complete(["learn", "model", str(data / part), *_LEARN], folder)
    return folder


def _kill_change(
    name: str, command: Sequence[str], kills: int, old: Path, images: Sequence[Path], rng: random.Random
) -> Tally:
    """Kills a command that makes a new generation; `old` holds the model before it."""
    new = old.with_name(f"{name}-new")
    shutil.copytree(old, new)
    seconds = complete(command, new)
    expected: dict[str, list[Any]] = {
        "old": answers(old / "model", images),
        "new": answers(new / "model", images),
    }
    print(f"{name}: {seconds:.1f} s without a kill", flush=True)
    tally = Tally({}, [])
    for number in range(kills):
        folder = old.with_name(f"{name}-{number}")
        shutil.copytree(old, folder)
        running = kill(command, folder, folder / "model", seconds, 3, rng)
        outcome, loss = attempt(partial(generation, folder / "model", images, expected))
        if loss is None and not running and outcome != "new":
            loss = "the command ended before the kill, and the model is the old one"
        tally.add(f"{name}: {'killed' if running else 'had ended'}, model is {outcome}", loss)
        shutil.rmtree(folder)
    return tally


def _exported(folder: Path) -> str:
    file = folder / "model.pt2"
    if not file.exists():
        return "no file"
    torch.export.load(file)
    return "a whole file"


def _no_leftovers(command: Sequence[str], folder: Path) -> str | None:
    time.sleep(2)  # a temporary file that is younger may be another writer's
    complete(command, folder)
    there = sorted(path.name for path in folder.iterdir())
    extra = set(there) - {"model", "model.pt2", "output.txt"}
    return f"files that nothing names stayed: {sorted(extra)}" if extra else None


def _wait_for_line(file: Path) -> None:
    deadline = time.monotonic() + 300
    while "serving" not in file.read_text(errors="replace"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server did not start: {file.read_text()[-2000:]}")
        time.sleep(0.05)
