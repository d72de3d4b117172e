"""The study of the residual adapter: runs what is missing and writes the tables.

    python benchmarks/residual.py FOLDER [--out results/residual] [--jobs 2] [--only NAME ...] [--tables]

FOLDER holds the images (``train/<class>/``, ``val/<class>/``). Every ``benchmarks/residual/NAME.yaml`` is an
experiment: the fields of a method, the streams and the seeds it is run on; see ``residual_run.py``. A run is
``OUT/NAME-STREAM-SEED.json``; one that is there is not repeated. ``--tables`` only writes ``OUT/tables.md``
and ``OUT/oracle.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
EXPERIMENTS = HERE / "residual"
COLUMNS: dict[str, tuple[str, str]] = {
    "heads": ("heads", "accuracy"),
    "heads given task": ("heads", "given_task"),
    "rows: final": ("rows final", "accuracy"),
    "rows: last layer": ("rows last", "accuracy"),
    "rows: all": ("rows all", "accuracy"),
    "rows: all, moved": ("rows moved", "accuracy"),
    "calibrated: final": ("calibrated final", "accuracy"),
    "calibrated: all": ("calibrated all", "accuracy"),
    "calibrated: all, moved": ("calibrated moved", "accuracy"),
    "given task": ("calibrated all", "given_task"),
    "forgetting given task": ("calibrated all", "forgetting_given_task"),
    "task found": ("calibrated all", "task"),
}
Run = tuple[str, str, int]  # experiment, stream, seed


def experiments() -> dict[str, dict[str, Any]]:
    """All experiments by name."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(EXPERIMENTS.glob("*.yaml"))}


def runs(known: dict[str, dict[str, Any]]) -> list[Run]:
    """What the experiments ask for."""
    return [
        (name, stream, seed) for name, e in known.items() for stream in e["streams"] for seed in e["seeds"]
    ]


def place(out: Path, run: Run) -> Path:
    """File of a run."""
    return out / "{}-{}-{}.json".format(*run)


def start(run: Run, folder: str, out: Path, jobs: int) -> bool:
    """Runs one in a process of its own; whether it succeeded."""
    name, stream, seed = run
    words = [EXPERIMENTS / f"{name}.yaml", stream, seed, folder, place(out, run)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, str(HERE / "residual_run.py"), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(f"{name} {stream} {seed}: " + ("done" if not done.returncode else done.stderr[-2000:]), flush=True)
    return not done.returncode


def spread(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation where there are several values; in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def table(out: Path, known: dict[str, dict[str, Any]], stream: str, kind: tuple[str, int]) -> list[str]:
    """Lines of the table of one stream for experiments of one kind (what is tested on, images a class)."""
    names = [
        n for n, e in known.items() if (e["test"], e["train_per_class"]) == kind and stream in e["streams"]
    ]
    lines = [
        f"| experiment | runs | {' | '.join(COLUMNS)} | gate finds task |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    for name in names:
        found = [place(out, (name, stream, seed)) for seed in known[name]["seeds"]]
        read = [json.loads(path.read_text()) for path in found if path.exists()]
        if not read:
            continue
        cells = [spread([r["readouts"][key][figure] for r in read]) for key, figure in COLUMNS.values()]
        gates = [r["gate"]["accuracy"] for r in read if r["gate"]]
        files = ", ".join(f"[{path.stem.rsplit('-', 1)[1]}]({path.name})" for path in found if path.exists())
        lines.append(f"| {name} | {files} | {' | '.join(cells)} | {spread(gates) if gates else '-'} |")
    return lines if len(lines) > 2 else []


def tables(out: Path, known: dict[str, dict[str, Any]]) -> str:
    """All tables as Markdown."""
    titles = {"held_back": "held-back training images (screening)", "val": "validation images (finals)"}
    text = ["# The study of the residual adapter: all runs", ""]
    text += [
        "Written by `python benchmarks/residual.py FOLDER`; accuracy in percent, mean ± sample standard "
    ]
    text += ["deviation over the seeds in the column `runs`. What the columns are: `docs/residual.md`.", ""]
    for kind in sorted({(e["test"], e["train_per_class"]) for e in known.values()}):
        for stream in ("random", "semantic", "domains"):
            lines = table(out, known, stream, kind)
            if lines:
                text += [f"## {stream}: {titles[kind[0]]}, {kind[1]} images a class", "", *lines, ""]
    return "\n".join(text)


def curve(out: Path, known: dict[str, dict[str, Any]]) -> None:
    """Picture of what a better gate would bring: accuracy over the share of the true task in the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, experiment in known.items() if experiment.get("oracle")]
    streams = [s for s in known["none"]["streams"] if any(place(out, (n, s, 0)).exists() for n in names)]
    figures = {"given_task": "given the task (%)", "accuracy": "among all classes (%)"}
    size = (4 * len(streams) + 2, 6)
    picture, axes = pyplot.subplots(
        2, len(streams), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for column, stream in enumerate(streams):
        axes[0][column].set_title(stream)
        axes[1][column].set_xlabel("share of the true task in the gate")
        for axis, figure in zip(axes[:, column], figures, strict=True):
            axis.grid(alpha=0.3)
            reference = place(out, ("none", stream, 0))
            if reference.exists():
                value = json.loads(reference.read_text())["readouts"]["calibrated all"][figure]
                axis.axhline(100 * value, color="grey", linestyle=":", label="none, calibrated")
            for number, name in enumerate(names):
                path = place(out, (name, stream, 0))
                if path.exists():
                    _draw(axis, json.loads(path.read_text()), name, figure, f"C{number}")
    for row, title in zip(axes, figures.values(), strict=True):
        row[0].set_ylabel(title)
    drawn = [axis.get_legend_handles_labels() for axis in axes[0]]
    handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    picture.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    picture.savefig(out / "oracle.png", dpi=110)
    pyplot.close(picture)


def _draw(axis: Any, result: dict[str, Any], name: str, figure: str, colour: str) -> None:
    mixed = {0.0: result["readouts"]} | {float(m): read for m, read in (result["oracle"] or {}).items()}
    for readout, style in (("heads", "-"), ("calibrated all", "--")):
        values = [100 * read[readout][figure] for read in mixed.values()]
        axis.plot(list(mixed), values, style, color=colour, marker=".", label=f"{name}, {readout.split()[0]}")


def main() -> int:
    """Runs, then writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--out", type=Path, default=Path("results/residual"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", help="names of experiments")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    asked = parser.parse_args()
    known = experiments()
    wanted = {name: e for name, e in known.items() if not asked.only or name in asked.only}
    missing = [run for run in runs(wanted) if not place(asked.out, run).exists() and not asked.tables]
    asked.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(asked.jobs) as pool:
        ended = list(pool.map(lambda run: start(run, asked.folder, asked.out, asked.jobs), missing))
    (asked.out / "tables.md").write_text(tables(asked.out, known) + "\n")
    curve(asked.out, known)
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
