"""How time and memory grow with the number of tasks: many small tasks learned one after another.

    python benchmarks/growth.py [--tasks 200] [--out results/growth] [--runs runs/growth]

Runs ``duallora run`` on the digits under seeded pixel permutations, two classes a task (20 images a class, 1
epoch, all test images seen so far every 20 tasks), and reads from its results.json and log: seconds a task by
part and bytes stored. What is stored by kind is noted after tasks 1, 10, 50, 100, 200 and the last. Writes
``growth.json`` and ``growth.png`` to OUT.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from duallora import ContinualLearner, cli

MARKS = (1, 10, 50, 100, 200)
PARTS = ("prepare_seconds", "learn_seconds", "consolidate_seconds")


def run(tasks: int, out: Path) -> None:
    """Learns the stream, unless it is learned already, and notes what is stored after some of its tasks."""
    if (out / "results.json").exists():
        return
    save = ContinualLearner.save

    def noting(learner: ContinualLearner, path: Path) -> None:
        save(learner, path)
        count = len(learner.tasks)
        if count in (*MARKS, tasks):
            notes = noted(out) | {str(count): stored(learner.method.state())}
            notes_of(out).write_text(json.dumps(notes))

    options = ["--stream", "permuted-digits", "--tasks", str(tasks), "--train-per-class", "20"]
    options += ["--epochs", "1", "--evaluate-every", "20", "--out", str(out)]
    with patch.object(ContinualLearner, "save", noting):  # a run keeps no earlier model than its last
        code = cli.main(["run", *options])
    if code:
        raise SystemExit(code)


def notes_of(out: Path) -> Path:
    """Beside the run's folder, which holds nothing else."""
    return out.with_name(f"{out.name}-stored.json")


def noted(out: Path) -> dict[str, Any]:
    """What is stored after a number of tasks, as far as it was noted."""
    path = notes_of(out)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def stored(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the saved tensors by kind: heads, rows, and what stands in the layers."""
    sizes: dict[str, int] = defaultdict(int)
    for key, tensor in state.items():
        first, _, rest = key.partition(".")
        kind = rest.rpartition(".")[2] if first == "layers" else f"{first}.{rest.partition('.')[0]}"
        kind = "heads" if first == "heads" else kind
        sizes[kind] += tensor.numel() * tensor.element_size()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def seconds_between(log: Path) -> list[float]:
    """Seconds from one task's end to the next, evaluation and saving included, from log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    times = [
        datetime.fromisoformat(line["time"]) for line in lines if line["event"] in ("learned", "evaluated")
    ]
    return [(b - a).total_seconds() for a, b in itertools.pairwise(times)]


def read(out: Path) -> dict[str, Any]:
    """What growth.json holds."""
    results = json.loads((out / "results.json").read_text())
    tasks = results["tasks"]
    curve = results["incremental_accuracy"]
    return {
        "tasks": len(tasks),
        "stored_bytes": [task["stored_bytes"] for task in tasks],
        "seconds": {part: [round(task[part], 4) for task in tasks] for part in PARTS},
        "seconds_between_tasks": seconds_between(out / "log.jsonl"),
        "stored_by_kind": noted(out),
        "accuracy_over_seen": {str(t + 1): share for t, share in enumerate(curve) if share is not None},
        "final_accuracy": results["final_accuracy"],
        "forgetting_given_task": results["forgetting_given_task"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "images_per_second": results["inference"]["images_per_second"],
        "config": results["config"],
        "environment": results["environment"],
    }


def draw(growth: dict[str, Any], path: Path) -> None:
    """Two panels: seconds a task by part, and megabytes stored."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = range(1, growth["tasks"] + 1)
    for part in PARTS:
        left.plot(steps, growth["seconds"][part], label=part.removesuffix("_seconds"), lw=1)
    left.set(xlabel="task", ylabel="seconds", title="a task of two classes, 40 images", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    right.plot(steps, [n / 1e6 for n in growth["stored_bytes"]])
    right.set(xlabel="tasks learned", ylabel="MB", title="stored beside the backbone", ylim=(0, None))
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what is missing and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/growth"))
    parser.add_argument("--runs", type=Path, default=Path("runs/growth"))
    given = parser.parse_args()
    run(given.tasks, given.runs)
    growth = read(given.runs)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "growth.json").write_text(json.dumps(growth, indent=1) + "\n")
    draw(growth, given.out / "growth.png")


if __name__ == "__main__":
    main()
