"""Kills commands at random moments and counts what is lost; it must be nothing.

    python benchmarks/kill.py 200

The kills are shared out evenly among six commands. After each kill of `learn`, `forget` or `undo` the model
must load, be the old or the new generation, and predict exactly what that generation predicts. After each
kill of `run` the same command resumes it, and must end with the results and the model of a run that was never
interrupted. After each kill of `export` the file is whole or not there, and the next one leaves no other.
After each kill of `serve` while a new generation comes, that generation is whole. Half of the kills fall at
any moment, half shortly after files have changed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kill_changes import kill_export, kill_forget, kill_serve, kill_undo
from killing import Tally, answers, attempt, complete, draw_images, generation, kill, start

TIMES = re.compile(r"seconds|per_second|peak_memory|learned_at|^time$|^date$|^environment$|^out$")
TRAIN_IMAGES, VAL_IMAGES = 12, 4


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


def leftovers(learn: Sequence[str], folder: Path) -> str | None:
    """Teaches once more after the kill: it must work, and remove what the killed process left behind."""
    again = start(["learn", "model", *learn[2:], "--name", "after the kill"], folder).wait()
    if again != 0:
        return f"learning again after the kill failed:\n{(folder / 'output.txt').read_text()[-2000:]}"
    manifest = json.loads((folder / "model" / "model.json").read_text())
    named = {*manifest["files"], *(manifest["previous"] or {"files": {}})["files"], "model.json", ".lock"}
    extra = {path.name for path in (folder / "model").iterdir()} - named
    return f"files that nothing names stayed: {sorted(extra)}" if extra else None


def results(folder: Path) -> Any:
    """``results.json`` without what differs between two equal runs."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if not TIMES.search(key)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "results.json").read_text()))


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


ACTS = {
    "learn": kill_learn,
    "run": kill_run,
    "forget": kill_forget,
    "undo": kill_undo,
    "export": kill_export,
    "serve": kill_serve,
}


def main() -> int:
    """Returns 1 when anything was lost."""
    parser = argparse.ArgumentParser(description="Kill commands at random moments; nothing may be lost.")
    parser.add_argument("kills", type=int, help="how many in all; the commands share them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=list(ACTS), help="kill one of them alone")
    arguments = parser.parse_args()
    chosen = {name: act for name, act in ACTS.items() if arguments.only in (None, name)}
    if arguments.kills < len(chosen):
        parser.error(f"kills must be at least {len(chosen)}, one for each command")
    shares = [len(range(n, arguments.kills, len(chosen))) for n in range(len(chosen))]
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
            act(share, data, Path(scratch), images, rng)
            for act, share in zip(chosen.values(), shares, strict=True)
        ]
    losses = [loss for tally in tallies for loss in tally.losses]
    print("\nkills  what was found")
    for tally in tallies:
        for outcome, count in sorted(tally.counts.items()):
            print(f"{count:5}  {outcome}")
    print(f"lost: {len(losses)} of {arguments.kills}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
