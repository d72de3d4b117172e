"""Kills `duallora learn` and `duallora run` at random moments and counts what is lost; it must be nothing.

    python benchmarks/kill.py 10

After each kill of `learn` the model must load, be the old or the new generation, and predict exactly what
that generation predicts. After each kill of `run` the same command resumes it, and must end with the results
and the model of a run that was never interrupted. Half of the kills fall at any moment, half shortly after
files have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duallora import ContinualLearner

COMMAND = [sys.executable, "-c", "import sys; from duallora.cli import main; sys.exit(main())"]
TIMES = re.compile(r"seconds|per_second|peak_memory|learned_at|^time$|^date$|^environment$|^out$")
SIZE, TRAIN_IMAGES, VAL_IMAGES = 64, 12, 4


@dataclass
class Tally:
    """What the kills met; a loss ends with exit code 1."""

    counts: dict[str, int]
    losses: list[str]

    def add(self, outcome: str, loss: str | None = None) -> None:
        """Counts one kill and prints what came of it."""
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if loss is not None:
            self.losses.append(loss)
        print(f"  {outcome}{'' if loss is None else f'  LOST: {loss}'}", flush=True)


def draw_images(folder: Path, classes: Sequence[str], count: int, rng: np.random.Generator) -> None:
    """Writes ``count`` noisy images of a colour of its own for every class, as FOLDER/<class>/<n>.png."""
    for name in classes:
        colour = rng.uniform(40, 215, size=3)
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(colour, 30, size=(SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a process group of its own, so that a kill reaches its loader processes too."""
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def complete(arguments: Sequence[str], folder: Path) -> float:
    """Runs a command to its end and returns its seconds; a failure ends this program."""
    begin = time.monotonic()
    if start(arguments, folder).wait() != 0:
        sys.exit(
            f"`duallora {' '.join(arguments)}` failed without a kill:\n{(folder / 'output.txt').read_text()}"
        )
    return time.monotonic() - begin


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """Names, inodes and sizes of everything below a folder."""
    entries = set()
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                stat = (Path(parent) / name).stat()
            except FileNotFoundError:
                continue  # replaced between the listing and the look
            entries.add((name, stat.st_ino, stat.st_size))
    return entries


def kill(
    arguments: Sequence[str], folder: Path, watched: Path, seconds: float, changes: int, rng: random.Random
) -> bool:
    """Starts a command and kills it; returns whether it was still running.

    Half of the kills wait for one of the first ``changes`` changes below ``watched``, because the moments in
    which files change are short beside a run of ``seconds``.
    """
    process = start(arguments, folder)
    if rng.random() < 0.5:
        deadline = time.monotonic() + rng.uniform(0, seconds)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    else:
        before, left = listing(watched), rng.randint(1, changes)
        while process.poll() is None and left:
            time.sleep(0.0005)
            now = listing(watched)
            left -= now != before
            before = now
        time.sleep(rng.uniform(0, 0.005))
    running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def answers(model: Path, images: Sequence[Path]) -> list[Any]:
    """All that the saved model says of the images."""
    learner = ContinualLearner.load(model, device="cpu")
    return [
        (p.label, p.probability, p.task, p.task_confidence, p.unknown, p.top) for p in learner.predict(images)
    ]


def results(folder: Path) -> Any:
    """``results.json`` without what differs between two equal runs."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if not TIMES.search(key)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "results.json").read_text()))


def attempt(check: Callable[[], str]) -> tuple[str, str | None]:
    """The outcome that a check names, or what it found lost."""
    try:
        return check(), None
    except (
        Exception
    ) as error:  # whatever keeps a model from loading is a loss, and the next kill is still wanted
        return "lost", f"{type(error).__name__}: {error}"


def kill_learn(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills the teaching of a second folder to a model that knows a first one."""
    learn = ["learn", "model", str(data / "second"), "--epochs", "1", "--device", "cpu"]
    old, new = work / "old", work / "new"
    old.mkdir()
    complete(["learn", "model", str(data / "first"), "--epochs", "1", "--device", "cpu"], old)
    shutil.copytree(old, new)
    seconds = complete(learn, new)
    expected = {"old": answers(old / "model", images), "new": answers(new / "model", images)}
    print(f"learn: {seconds:.1f} s without a kill", flush=True)

    tally = Tally({}, [])
    for number in range(kills):
        folder = work / f"learn-{number}"
        shutil.copytree(old, folder)
        running = kill(learn, folder, folder / "model", seconds, 3, rng)
        outcome, loss = attempt(partial(generation, folder / "model", images, expected))
        if loss is None and not running and outcome != "new":
            loss = "the command ended before the kill, and the model is the old one"
        if loss is None and number == kills - 1:
            loss = leftovers(learn, folder)
        tally.add(f"learn: {'killed' if running else 'had ended'}, model is {outcome}", loss)
        shutil.rmtree(folder)
    return tally


def generation(model: Path, images: Sequence[Path], expected: dict[str, list[Any]]) -> str:
    """Which of the two generations a model is, by what it predicts."""
    found = answers(model, images)
    for name, predictions in expected.items():
        if found == predictions:
            return name
    raise ValueError("the model loads, but predicts neither as the old nor as the new one")


def leftovers(learn: Sequence[str], folder: Path) -> str | None:
    """Teaches once more after the kill: it must work, and remove what the killed process left behind."""
    again = start(["learn", "model", *learn[2:], "--name", "after the kill"], folder).wait()
    if again != 0:
        return f"learning again after the kill failed:\n{(folder / 'output.txt').read_text()[-2000:]}"
    manifest = json.loads((folder / "model" / "model.json").read_text())
    named = {*manifest["files"], *(manifest["previous"] or {"files": {}})["files"], "model.json", ".lock"}
    extra = {path.name for path in (folder / "model").iterdir()} - named
    return f"files that nothing names stayed: {sorted(extra)}" if extra else None


def kill_run(kills: int, data: Path, work: Path, images: Sequence[Path], rng: random.Random) -> Tally:
    """Kills the main job, resumes it, and compares its results with those of an uninterrupted run."""
    run = [
        "run",
        "--out",
        "out",
        "--stream",
        str(data / "stream"),
        "--tasks",
        "2",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    whole = work / "whole"
    whole.mkdir()
    seconds = complete(run, whole)
    expected = results(whole / "out"), answers(whole / "out" / "model", images)
    print(f"run: {seconds:.1f} s without a kill", flush=True)

    tally = Tally({}, [])
    for number in range(kills):
        folder = work / f"run-{number}"
        folder.mkdir()
        running = kill(run, folder, folder / "out", seconds, 30, rng)
        outcome, loss = attempt(partial(resume, run, folder, images, expected))
        tally.add(f"run: {'killed' if running else 'had ended'}, {outcome}", loss)
        shutil.rmtree(folder)
    return tally


def resume(run: Sequence[str], folder: Path, images: Sequence[Path], expected: tuple[Any, list[Any]]) -> str:
    """Repeats the command until it is finished and compares; says how far the killed one had come."""
    out = folder / "out"
    finished, begun = (out / "results.json").exists(), (out / "model" / "model.json").exists()
    if begun:
        answers(out / "model", images)
    code = start(run, folder).wait()
    # A run that was killed between its last file and its end is finished, and refused as such.
    if code != 0 and not (finished and code == 2):
        raise ValueError(f"the resumed run ended with {code}:\n{(folder / 'output.txt').read_text()[-2000:]}")
    if results(out) != expected[0]:
        raise ValueError("results.json differs from that of an uninterrupted run")
    if answers(out / "model", images) != expected[1]:
        raise ValueError("the model predicts otherwise than that of an uninterrupted run")
    return "was finished" if finished else "resumed from a saved task" if begun else "started again"


def main() -> int:
    """Returns 1 when anything was lost."""
    parser = argparse.ArgumentParser(description="Kill learn and run at random moments; nothing may be lost.")
    parser.add_argument("kills", type=int, help="how often each of the two is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=["learn", "run"], help="kill one of the two alone")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error("kills must be at least 1")
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="duallora-kill-") as scratch:
        data = Path(scratch) / "data"
        pixels = np.random.default_rng(arguments.seed)
        draw_images(data / "first", ["ant", "bee"], TRAIN_IMAGES, pixels)
        draw_images(data / "second", ["cat", "dog"], TRAIN_IMAGES, pixels)
        for part, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
            draw_images(data / "stream" / part, ["ant", "bee", "cat", "dog"], count, pixels)
        images = sorted((data / "stream" / "val").rglob("*.png"))
        tallies = [
            act(arguments.kills, data, Path(scratch), images, rng)
            for name, act in (("learn", kill_learn), ("run", kill_run))
            if arguments.only in (None, name)
        ]
    losses = [loss for tally in tallies for loss in tally.losses]
    print("\nkills  what was found")
    for tally in tallies:
        for outcome, count in sorted(tally.counts.items()):
            print(f"{count:5}  {outcome}")
    print(f"lost: {len(losses)} of {arguments.kills * len(tallies)}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
