"""Accuracy over the optimiser steps of the first task, whose adapter all later tasks are then read through.

    python benchmarks/adapters_steps.py DATA [--out results/adapters] [--steps 25 50 ...]

Held-back training images of ``gtsrb`` (15 a class; 25 a class are learned). Only the first task of eight is
trained; class rows of all tasks are then taken from the features it left, as the default does in a single
domain. Lines: the residual adapter (the default), and the orthogonal one alone. Writes ``OUT/steps.json``; a
figure that is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import load_stream
from duallora import load_backbone
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.learner import ContinualLearner
from duallora.methods import METHODS
from duallora.storage.atomic import write_atomic
from duallora.streams import Stream, TaskDataset

LINES: dict[str, dict[str, Any]] = {
    "duallora": {},
    "duallora-o": {"residual": "none", "rank": 50},
}
STEPS = (25, 50, 100, 200, 400, 800)
BATCH = 64


@torch.no_grad()
def seen(learner: ContinualLearner, images: TaskDataset) -> tuple[Tensor, Tensor]:
    """Features (n, row_dim) and labels (n,) inside the task."""
    inputs = torch.stack([learner.preprocess(image) for image, _ in images])  # type: ignore[attr-defined]
    found = [learner.method.encode(batch).features for batch in inputs.split(BATCH)]
    return torch.cat(found), torch.tensor(images.targets)


def accuracy(learner: ContinualLearner, stream: Stream) -> float:
    """Of class rows of all tasks on the features as they are now, in percent."""
    rows = ClassStatistics(learner.method.backbone.row_dim, learner.device)
    for number, task in enumerate(stream):
        features, labels = seen(learner, task.train)
        rows.replace(number, ClassMoments.of(features, labels, len(task.train.classes)))
        rows.fit_temperature(number, features, labels)
    right, first = [], 0
    for task in stream:
        features, labels = seen(learner, task.test)
        right.append(rows.log_q(features).argmax(1) == labels + first)
        first += len(task.train.classes)
    return 100 * float(torch.cat(right).double().mean())


def after(stream: Stream, fields: dict[str, Any], steps: int) -> float:
    """Accuracy after so many steps of the first task; 0 leaves the backbone as it is."""
    config = METHODS["duallora"].config(**{"epochs": 1, "min_steps": steps} | fields)
    learner = ContinualLearner(
        load_backbone("embedded"), config, 0, augment=stream.augmentation, device="cpu"
    )
    if steps:
        learner.learn(stream.tasks[0].train, name="task 1")
    return accuracy(learner, stream)


def main() -> None:
    """Computes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/adapters"))
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS))
    words = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    place = words.out / "steps.json"
    found: dict[str, dict[str, float]] = json.loads(place.read_text()) if place.exists() else {}
    stream = load_stream(words.data, "gtsrb", "held_back", 25)
    for steps in (0, *words.steps):
        for name, fields in LINES.items():
            own = found.setdefault(name, {})
            if str(steps) not in own:
                own[str(steps)] = after(stream, fields, steps)
                write_atomic(place, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
