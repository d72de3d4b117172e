"""A command that is started and killed, and what a saved model says afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duallora import ContinualLearner

COMMAND = [sys.executable, "-c", "import sys; from duallora.cli import main; sys.exit(main())"]
SIZE = 64


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


def attempt(check: Callable[[], str]) -> tuple[str, str | None]:
    """The outcome that a check names, or what it found lost."""
    try:
        return check(), None
    except (
        Exception
    ) as error:  # whatever keeps a model from loading is a loss, and the next kill is still wanted
        return "lost", f"{type(error).__name__}: {error}"


def generation(model: Path, images: Sequence[Path], expected: dict[str, list[Any]]) -> str:
    """Which of the two generations a model is, by what it predicts."""
    found = answers(model, images)
    for name, predictions in expected.items():
        if found == predictions:
            return name
    raise ValueError("the model loads, but predicts neither as the old nor as the new one")
