"""How long a run takes, by estimate: from seconds that ``duallora bench`` measured, or operations it counted.

What is counted: training steps, the passes before and after a task, and the evaluation of all test images
seen so far after every task. Decoding of images, compilation and the start of a process are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duallora.errors import DualLoRAError
from duallora.storage.regular import read_regular

PLAIN = "lora"
BACKBONE_FLOPS = 35.126e9
"""Of one forward pass of ViT-B/16 at 224 x 224 (``results/bench-vit-b16/bench.json``)."""
FLOPS_PER_SECOND = 40e12
"""Assumed, not measured: about an eighth of what the data sheet of an A100 gives for bf16."""

# Prediction and training step of an image over one forward pass of the backbone, and passes over the images
# around training: ten tasks, batch 64, results/bench-embedded/bench.json.
OPERATIONS: Mapping[str, tuple[float, float, float]] = {
    "c-lora": (1.00, 1.60, 1),
    "clora": (1.00, 1.64, 1),
    "coda-prompt": (2.02, 2.89, 2),
    "color": (2.02, 1.60, 3),
    "duallora": (1.00, 1.59, 2),
    "dualprompt": (2.02, 2.90, 2),
    "frozen": (1.00, 1.00, 2),
    "inflora": (1.00, 1.59, 2),
    "joint": (1.00, 1.60, 1),
    "l2p": (2.34, 3.63, 2),
    "linear": (1.00, 1.00, 1),
    "lora": (1.00, 1.60, 1),
    "ncm": (1.00, 0.00, 1),
    "o-lora": (1.00, 1.83, 1),
    "ranpac": (1.01, 0.00, 1),
    "sd-lora": (1.00, 1.83, 1),
    "slca": (1.00, 3.02, 1),
    "sldc": (1.00, 2.60, 2),
    "sora": (1.00, 1.60, 1),
}


@dataclass(frozen=True)
class Cost:
    """Seconds an image.

    Attributes:
        prediction: In an evaluation.
        step: Each time that it is trained on.
        passes: Before and after the training of its task, together.
    """

    prediction: float
    step: float
    passes: float


@dataclass(frozen=True)
class Costs:
    """Costs by method, and in words where they are from.

    Attributes:
        known: By method.
        source: A sentence.
    """

    known: Mapping[str, Cost]
    source: str

    def of(self, method: str) -> Cost:
        """Of a method; one that was not measured counts as plain LoRA."""
        return self.known.get(method, self.known[PLAIN])


@dataclass(frozen=True)
class Work:
    """What a run does.

    Attributes:
        method: Registered name.
        epochs: Of a task; 0 where nothing is trained.
        train: Training images of all tasks.
        test: Test images of all tasks.
        tasks: Evaluations, each on all test images seen so far.
    """

    method: str
    epochs: float
    train: int
    test: int
    tasks: int

    def seconds(self, costs: Costs) -> float:
        """The estimate."""
        cost = costs.of(self.method)
        evaluated = self.test * (self.tasks + 1) / 2
        return self.train * (self.epochs * cost.step + cost.passes) + evaluated * cost.prediction


def counted() -> Costs:
    """From operations, at an assumed number of operations a second."""
    second = BACKBONE_FLOPS / FLOPS_PER_SECOND
    return Costs(
        {name: Cost(*(second * times for times in each)) for name, each in OPERATIONS.items()},
        f"operations counted by duallora bench (ViT-B/16 at 224: {BACKBONE_FLOPS / 1e9:.1f} GFLOP a forward "
        f"pass), at {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s, which is assumed and not measured",
    )


def measured(folder: Path) -> Costs:
    """From a measurement: the row nearest to ten tasks with the largest batch, of every method.

    Args:
        folder: Of ``duallora bench``.

    Raises:
        DualLoRAError: It holds no measurement, or none of ``lora`` with its training.
    """
    path = folder / "bench.json"
    try:
        content = json.loads(read_regular(path))
        rows: Sequence[Mapping[str, Any]] = [row for row in content["rows"] if "task_images" in row]
        best: dict[str, Mapping[str, Any]] = {}
        for row in sorted(rows, key=lambda row: (abs(row["tasks"] - 10), -row["batch"])):
            best.setdefault(str(row["method"]), row)
        known = {name: _measured(row) for name, row in best.items()}
        where = f"{content['environment']['device']}, precision {content['environment']['precision']}"
    except FileNotFoundError as error:
        raise DualLoRAError(f"{folder} holds no bench.json; give the --out of duallora bench.") from error
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DualLoRAError(f"{path} cannot be read; measure again with duallora bench.") from error
    if PLAIN not in known:
        raise DualLoRAError(f"{path} has no training of {PLAIN}, which stands for methods that it lacks.")
    about = next(iter(best.values()))
    return Costs(known, f"seconds measured by duallora bench in {path} ({about['backbone']}, {where})")


def _measured(row: Mapping[str, Any]) -> Cost:
    step = row["training_seconds"] / row["training_batch"] if row.get("training_batch") else 0.0
    around = (row["prepare_seconds"] + row["consolidate_seconds"]) / row["task_images"]
    return Cost(row["prediction_seconds"] / row["batch"], step, around)
