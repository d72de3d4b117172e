"""What ``results.json`` holds, put together from hits and from what is measured once, at the end of a run."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duallora.predictions import READOUTS, best, calibration_error, class_probabilities, readouts_of
from duallora.runs import answers
from duallora.runs.metrics import Hits, count_hits, feature_drift, summary
from duallora.runtime import parallel

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner
    from duallora.outputs import Outputs, TaskRecord
    from duallora.streams import Stream, TaskDataset

SCHEMA_VERSION = 1
MEASURED = frozenset(
    {"prepare_seconds", "learn_seconds", "consolidate_seconds", "images_per_second", "peak_memory_bytes"}
)
"""Keys whose values differ from run to run; all others are equal for the same seed on the same machine."""

Row = dict[str, list[Hits | None]]
"""Evaluation after one task: readout -> hits on the test images of every task seen so far, None where not."""

_SPEED_IMAGES, _SPEED_REPEATS, _SPEED_SECONDS = 256, 5, 30.0
_PACKAGES = ("duallora", "torch", "torchvision", "timm", "lightning-fabric", "torchmetrics", "scikit-learn")


@dataclass
class FinalPass:
    """What the evaluation after the last task gathers, one entry a task.

    Attributes:
        readout: The method's own readout.
        row: Hits, by readout.
        confidence: Largest class probabilities, by readout.
        correct: Whether that class is right, by readout.
        probabilities: (n, C) class probabilities under the method's own readout.
        posterior_hits: Images whose task has the largest posterior.
        own_gate: Mean weight of the task's own residual; None where there is no gate.
        drift: Relative change of the final features since the task was learned.
    """

    readout: str = READOUTS[0]
    row: Row = field(default_factory=dict)
    confidence: dict[str, list[Tensor]] = field(default_factory=dict)
    correct: dict[str, list[Tensor]] = field(default_factory=dict)
    probabilities: list[Tensor] = field(default_factory=list)
    posterior_hits: list[int] = field(default_factory=list)
    own_gate: list[float | None] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)

    def add(self, outputs: Outputs, labels: Tensor, features_then: Tensor) -> None:
        """Takes in the next task's test images.

        Args:
            outputs: What the learner says about them now.
            labels: (n,) true class indices.
            features_then: (n, d) final features right after the task was learned.
        """
        task = len(self.drift)
        for name in readouts_of(outputs):
            confidence, found = best(class_probabilities(outputs, name))
            self.row.setdefault(name, []).append(count_hits(outputs, name, labels, task))
            self.confidence.setdefault(name, []).append(confidence)
            self.correct.setdefault(name, []).append(found == labels)
        self.readout = outputs.readout
        self.probabilities.append(class_probabilities(outputs).float())
        self.posterior_hits.append(int((outputs.task_posterior.argmax(1) == task).sum()))
        self.own_gate.append(None if outputs.gate is None else float(outputs.gate[:, task].double().mean()))
        self.drift.append(feature_drift(outputs.features, features_then))


def assemble(
    learner: ContinualLearner,
    stream: Stream,
    config: dict[str, Any],
    rows: Sequence[Row],
    final: FinalPass,
    precision: str,
) -> dict[str, Any]:
    """The contents of ``results.json``.

    Args:
        learner: After the last task.
        stream: What it has learned.
        config: What was asked for.
        rows: Evaluations after every task, the final one included.
        final: The evaluation after the last task.
        precision: Of the backbone's products.
    """
    readouts = {name: _readout(name, rows, final) if name in final.row else None for name in READOUTS}
    info = learner.backbone.info
    return {
        "version": SCHEMA_VERSION,
        "readout": final.readout,
        **(readouts[final.readout] or {}),
        "task_posterior_accuracy": _posterior_accuracy(final),
        "feature_drift": final.drift,
        "readouts": readouts,
        "answers": answers.packed([task.test for task in stream], final.correct),
        "tasks": [
            _task(record, task.test, gate)
            for record, task, gate in zip(learner.tasks, stream, final.own_gate, strict=True)
        ],
        "inference": {
            "images_per_second": images_per_second(learner, [task.test for task in stream]),
            "forward_passes_per_image": learner.forward_passes,
        },
        "peak_memory_bytes": peak_memory_bytes(learner.device),
        "backbone": {
            "name": info.name,
            "sha256": info.sha256,
            "mean": list(info.mean),
            "std": list(info.std),
            "input_size": list(info.input_size),
        },
        "stream": {
            "name": stream.name,
            "class_order": list(stream.class_order),
            "order_seed": stream.order_seed,
            "order_rule": stream.order_rule,
        },
        "config": config,
        "environment": environment(learner.device) | {"processes": parallel.size(), "precision": precision},
    }


def images_per_second(learner: ContinualLearner, tests: Sequence[TaskDataset]) -> float:
    """Images per second of `ContinualLearner.predict`, preprocessing included and decoding not.

    The median of up to five passes over the same images (at most 256 test images, of all tasks), after one
    that does not count; fewer passes where they would take more than half a minute.
    """
    share = max(1, _SPEED_IMAGES // len(tests))
    images = [test[i][0] for test in tests for i in range(min(share, len(test)))]
    learner.predict(images)
    seconds: list[float] = []
    while len(seconds) < _SPEED_REPEATS and sum(seconds) < _SPEED_SECONDS:
        start = time.perf_counter()
        learner.predict(images)
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory so far: allocated on the GPU, or resident in this process on the CPU; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, but for macOS


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "packages": {package: _version(package) for package in _PACKAGES},
    }


def _readout(name: str, rows: Sequence[Row], final: FinalPass) -> dict[str, Any]:
    error = calibration_error(torch.cat(final.confidence[name]), torch.cat(final.correct[name]))
    return summary([row[name] for row in rows], error)


def _posterior_accuracy(final: FinalPass) -> float:
    images = sum(entry.images for entry in final.row[final.readout] if entry is not None)
    return sum(final.posterior_hits) / images


def _task(record: TaskRecord, test: TaskDataset, own_gate: float | None) -> dict[str, Any]:
    return {
        "name": record.name,
        "classes": list(record.classes),
        "train_images": record.train_images,
        "test_images": len(test),
        "prepare_seconds": record.prepare_seconds,
        "learn_seconds": record.learn_seconds,
        "consolidate_seconds": record.consolidate_seconds,
        "trainable_parameters": record.trainable_parameters,
        "stored_bytes": record.stored_bytes,
        "orthogonal_norm": record.orthogonal_norm,
        "residual_norm": record.residual_norm,
        "own_gate": own_gate,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return None
