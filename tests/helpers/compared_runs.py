"""Results of runs, written down by hand, and the lines of a comparison made of them."""

from __future__ import annotations

import base64
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from duallora.runs.comparison import (
    ACCURACIES,
    COSTS,
    Entry,
    Results,
)
from duallora.runs.comparison_tables import Comparison
from duallora.runs.room import default_reference, find_evidence

RUN: Results = {
    "readout": "calibrated",
    "task_posterior_accuracy": 0.5,
    "readouts": {
        "heads": {
            "oracle_accuracy_matrix": [[1.0, None], [0.8, 1.0]],
            "incremental_accuracy": [0.9, 0.7],
            "final_accuracy": 0.7,
            "final_row_accuracy": 0.65,
            "final_accuracy_task_mean": 0.72,
            "average_incremental_accuracy": 0.8,
            "forgetting": 0.3,
            "forgetting_given_task": 0.2,
            "backward_transfer": -0.28,
            "task_identity_accuracy": 0.75,
            "calibration_error": 0.12,
        },
        "calibrated": {
            "oracle_accuracy_matrix": [[1.0, None], [0.9, 0.7]],
            "incremental_accuracy": [0.92, 0.78],
            "final_accuracy": 0.78,
            "final_row_accuracy": 0.77,
            "final_accuracy_task_mean": 0.79,
            "average_incremental_accuracy": 0.85,
            "forgetting": 0.1,
            "forgetting_given_task": 0.05,
            "backward_transfer": -0.09,
            "task_identity_accuracy": 0.83,
            "calibration_error": 0.04,
        },
    },
    "tasks": [
        {
            "test_images": 10,
            "prepare_seconds": 1.0,
            "learn_seconds": 20.0,
            "consolidate_seconds": 3.0,
            "trainable_parameters": 3_000_000,
            "stored_bytes": 4_000_000,
        },
        {
            "test_images": 30,
            "prepare_seconds": 0.5,
            "learn_seconds": 10.0,
            "consolidate_seconds": 0.25,
            "trainable_parameters": 2_000_000,
            "stored_bytes": 7_500_000,
        },
    ],
    "inference": {"images_per_second": 250.0, "forward_passes_per_image": 2},
}


OF_HEADS = {
    "final_accuracy": 0.7,
    "final_row_accuracy": 0.65,
    "final_accuracy_task_mean": 0.72,
    "given_task": (0.8 * 10 + 1.0 * 30) / 40,
    "average_incremental_accuracy": 0.8,
    "forgetting": 0.3,
    "forgetting_given_task": 0.2,
    "backward_transfer": -0.28,
    "task_identity_accuracy": 0.75,
    "task_posterior_accuracy": 0.5,
    "calibration_error": 0.12,
}


OF_COST = {
    "trainable_mb": 12.0,  # the larger task's, four bytes each
    "stored_mb": 7.5,  # after the last task
    "training_seconds": 34.75,
    "images_per_second": 250.0,
    "forward_passes": 2,
}


BETWEEN_TASKS = {
    "final_row_accuracy",
    "given_task",
    "average_incremental_accuracy",
    "forgetting",
    "forgetting_given_task",
    "backward_transfer",
    "task_identity_accuracy",
    "task_posterior_accuracy",
}


FIGURES = {figure.key: figure for figure in (*ACCURACIES, *COSTS)}


def result(final: float | None = None, **changes: Any) -> Results:
    """A copy of the made-up results, with another final accuracy under both readouts."""
    made = copy.deepcopy(RUN | changes)
    for figures in made["readouts"].values():
        if figures is not None and final is not None:
            figures["final_accuracy"] = final
    return made


def plain(final: float | None = None) -> Results:
    """Results of a method that calibrates nothing."""
    made = result(final, readout="heads")
    made["readouts"]["calibrated"] = None
    return made


def line(name: str, *runs: Results, **about: Any) -> Entry:
    known = {"method": "lora", "reconstruction": False, "upper_bound": False}
    return Entry(name, **{**known, **about}, seeds=tuple(range(len(runs))), runs=runs)


def joint(*runs: Results) -> Entry:
    """A line that learned all at once: its results have one task."""
    single = [result(**{**run, "tasks": run["tasks"][-1:]}) for run in runs]
    for run in single:
        for figures in run["readouts"].values():
            figures["oracle_accuracy_matrix"] = [[figures["final_accuracy"]]]
            figures["incremental_accuracy"] = [figures["final_accuracy"]]
    return line("joint", *single, method="joint", upper_bound=True)


LINES = [
    line("duallora", result(0.81), result(0.83), method="duallora"),
    line("heads <i>only</i> | a", plain(0.6), plain(0.65)),
    line("sora", result(0.5), method="sora", reconstruction=True),
    joint(result(0.9), result(0.95)),
]


def compared(entries: Sequence[Entry], protocol: Sequence[str] = (), command: str = "") -> Comparison:
    """A comparison of these lines."""
    return Comparison(entries, find_evidence(entries), default_reference(entries), protocol, command)


def answered(by_class: Sequence[int], images: str = "a", **right: Sequence[int]) -> Results:
    """Results with answers by image; heads and calibrated are given alike where only one of them is.

    Args:
        by_class: Test images of every class.
        images: Stands for the hash of the images.
        right: For a readout, 1 for every image that it names rightly, in the order of the classes.
    """
    both = {name: right.get(name, next(iter(right.values()))) for name in ("heads", "calibrated")}
    counts = (sum(by_class), 0)
    made = result(tasks=[task | {"test_images": n} for task, n in zip(RUN["tasks"], counts, strict=True)])
    for name, bits in both.items():
        made["readouts"][name]["final_accuracy"] = sum(bits) / sum(by_class)
    made["answers"] = {
        "images_sha256": images,
        "images_by_class": {f"class {i}": count for i, count in enumerate(by_class)},
        "right": {
            name: base64.b64encode(np.packbits(np.array(bits, bool))).decode() for name, bits in both.items()
        },
    }
    return made
