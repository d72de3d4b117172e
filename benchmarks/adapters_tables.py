"""Tables and a picture of the study of the adapters; see ``adapters.py``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

STREAMS = ("gtsrb", "mixed", "seedlings", "domains", "random", "semantic")
LINES = ("duallora", "duallora-o", "ranpac", "sldc", "inflora", "lora", "frozen", "joint")
CALIBRATED = ("duallora", "duallora-o", "frozen", "joint")  # the others answer with their own heads
COLUMNS = ("accuracy", "calibration_error", "forgetting_given_task")
Runs = dict[tuple[str, str], dict[int, dict[str, Any]]]  # (experiment, stream) -> seed -> run


def read(out: Path) -> Runs:
    """All runs of a folder that are on validation images."""
    found: Runs = defaultdict(dict)
    for path in sorted(out.glob("*-?.json")):
        run = json.loads(path.read_text())
        if run["test"] == "val":
            found[run["experiment"], run["stream"]][run["seed"]] = run
    return found


def answer(run: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run as its method predicts."""
    readout = "calibrated" if run["experiment"] in CALIBRATED else "heads"
    figures: dict[str, Any] = run["readouts"][readout]
    return figures


def room(runs: Runs, name: str, stream: str, seed: int) -> float | None:
    """``(method - frozen) / (joint - frozen)`` of the answers, of one seed; None where a run is missing."""
    try:
        own, frozen, joint = (
            answer(runs[line, stream][seed])["accuracy"] for line in (name, "frozen", "joint")
        )
    except KeyError:
        return None
    return (own - frozen) / (joint - frozen) if joint > frozen else None


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(runs: Runs, stream: str) -> list[str]:
    """A stream's lines."""
    text = [
        "| | answers with | accuracy | room captured | heads | rows | calibrated | calibration error | "
        "forgetting given the task | seeds | s |",
        "| --- " * 11 + "|",
    ]
    for name in LINES:
        seeds = runs.get((name, stream), {})
        if not seeds:
            continue
        done = list(seeds.values())
        readouts = {
            key: spread([r["readouts"][key]["accuracy"] for r in done if key in r["readouts"]])
            for key in ("heads", "rows", "calibrated")
        }
        own = [answer(r) for r in done]
        rooms = [x for x in (room(runs, name, stream, seed) for seed in seeds) if x is not None]
        lost = [f["forgetting_given_task"] for f in own if "forgetting_given_task" in f]
        text.append(
            f"| `{name}` | {'calibrated' if name in CALIBRATED else 'heads'} | "
            f"**{spread([f['accuracy'] for f in own])}** | {spread(rooms, 2)} | {readouts['heads']} | "
            f"{readouts['rows']} | {readouts['calibrated']} | "
            f"{spread([f['calibration_error'] for f in own], 3)} | {spread(lost)} | "
            f"{', '.join(map(str, sorted(seeds)))} | {spread([r['seconds'] for r in done], 0)} |"
        )
    return text


def curve(out: Path) -> None:
    """Accuracy over the steps of the first task, from ``steps.json``."""
    place = out / "steps.json"
    if not place.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    asked: set[int] = set()
    for name, figures in json.loads(place.read_text()).items():
        trained = sorted((int(steps), value) for steps, value in figures.items() if steps != "0")
        asked |= {steps for steps, _ in trained}
        axis.plot(*zip(*trained, strict=True), marker=".", label=name)
        axis.axhline(figures["0"], color="grey", linestyle=":")
    axis.set_xlabel("optimiser steps of the first task")
    axis.set_ylabel("accuracy of the rows (%)")
    axis.set_xscale("log")
    axis.set_xticks(sorted(asked), sorted(asked))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out / "steps.png", dpi=110)
    pyplot.close(figure)


def write_tables(out: Path) -> None:
    """Writes ``tables.md`` and ``steps.png``; ``room_picture.py`` draws the room captured."""
    runs = read(out)
    text = [
        "# The study of the adapters: all runs",
        "",
        "Written by `python benchmarks/adapters.py DATA`; validation images, percent, mean ± sample standard "
        "deviation over the seeds.",
        "`Room captured` is (method - frozen) / (joint - frozen) of the answers, 1 for joint training.",
    ]
    for stream in STREAMS:
        if any(key[1] == stream for key in runs):
            text += ["", f"## {stream}", "", *table(runs, stream)]
    (out / "tables.md").write_text("\n".join(text) + "\n")
    curve(out)
