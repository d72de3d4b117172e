"""What of a run is worth watching while it goes on, by the names under which loggers show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duallora.outputs import Outputs
from duallora.runs.metrics import Hits, accuracy


def of_row(row: Mapping[str, Sequence[Hits | None]]) -> dict[str, float]:
    """Accuracy on the test images of each task, and on all where all were looked at, by readout.

    Args:
        row: hits after the latest task, by readout, as the run's folder keeps them.
    """
    found = {}
    for readout, hits in row.items():
        if None not in hits:
            found[f"accuracy/{readout}/all seen"] = accuracy(hits)
        for number, of_task in enumerate(hits, 1):
            if of_task is not None:
                found[f"accuracy/{readout}/task {number}"] = accuracy([of_task])
    return found


def of_gate(outputs: Outputs, task: int) -> dict[str, float]:
    """Mean weight of a task's own residual adapter over test images of that task, where there is a gate.

    Args:
        outputs: for those images.
        task: its index.
    """
    if outputs.gate is None:
        return {}
    return {f"gate/task {task + 1}": float(outputs.gate[:, task].double().mean())}
