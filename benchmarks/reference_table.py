"""The reference table of the README from finished runs: mean and sample standard deviation over seeds.

    python benchmarks/reference_table.py results/reference

Every ``*.json`` in the folder is one run's ``results.json``; runs with the same stream and method make one
row. Each method stands under its better readout, which is named. Figures are in percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
COLUMNS = (
    "final accuracy",
    "class and task right",
    "given the task",
    "forgetting",
    "forgetting given the task",
    "task found",
)


def spread(values: Sequence[float | None]) -> str:
    """``mean ± sd`` in percent, or a dash where a method has no such figure."""
    found = [100 * value for value in values if value is not None]
    if not found:
        return "-"
    if len(found) == 1:
        return f"{found[0]:.1f}"
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def given_task(readout: Results) -> float:
    """Accuracy over the last row of the matrix in which the probabilities are restricted to the true task."""
    row: list[float] = readout["oracle_accuracy_matrix"][-1]
    return statistics.mean(row)


def figures(name: str) -> list[Callable[[Results], float | None]]:
    """The columns' values from one run under one readout."""
    return [
        lambda run: run["readouts"][name]["final_accuracy"],
        lambda run: run["readouts"][name]["final_row_accuracy"],
        lambda run: given_task(run["readouts"][name]),
        lambda run: run["readouts"][name]["forgetting"],
        lambda run: run["readouts"][name]["forgetting_given_task"],
        lambda run: run["task_posterior_accuracy"],
    ]


def better(runs: Sequence[Results], measure: str) -> str:
    """The readout with the higher mean of ``measure``."""
    names = [name for name, readout in runs[0]["readouts"].items() if readout is not None]
    return max(names, key=lambda name: statistics.mean(run["readouts"][name][measure] for run in runs))


def main() -> int:
    """Prints one table a stream."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    groups: dict[str, dict[str, list[Results]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        run = json.loads(path.read_text())
        stream = "domains" if run["config"]["domains"] else "cl100"
        groups[stream][run["config"]["method"]["name"]].append(run)
    for stream, methods in groups.items():
        measure = "final_row_accuracy" if stream == "domains" else "final_accuracy"
        print(f"\n{stream}\n\n| method | readout | seeds | {' | '.join(COLUMNS)} | plain heads |")
        print("| --- " * (len(COLUMNS) + 4) + "|")
        for method, runs in methods.items():
            name = better(runs, measure)
            seeds = ", ".join(str(run["config"]["seed"]) for run in runs)
            cells = [spread([figure(run) for run in runs]) for figure in figures(name)]
            heads = spread([run["readouts"]["heads"][measure] for run in runs])
            print(f"| `{method}` | {name} | {seeds} | " + " | ".join([*cells, heads]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
