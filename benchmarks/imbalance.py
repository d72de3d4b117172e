"""Whether weights of the classes in the loss help where classes have unequal numbers of images.

    python benchmarks/imbalance.py digits gtsrb=FOLDER --out results/imbalance.json

FOLDER holds images in ``train/<class>/``. Ten classes are drawn by the seed and learned in two tasks; in each
task the numbers of training images fall from 60 to 6 in equal ratios. Tested is on twenty other training
images of each class. Every method is trained with and without weights; given are the mean recall of the
classes and that of the two rarest of each task, under both readouts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from duallora import METHODS, ContinualLearner
from duallora.predictions import best, class_probabilities
from duallora.runtime.compute import Compute
from duallora.storage.atomic import write_atomic
from duallora.streams import FolderDataset, all_at_once, digits
from duallora.streams.task import TaskDataset, as_task_dataset, positions_by_class
from duallora.teaching.training_images import present

CLASSES, TASKS, TESTED = 10, 2, 20
COUNTS = [round(60 * (6 / 60) ** (place / 4)) for place in range(5)]  # 60, 34, 19, 11, 6


def images(where: str) -> Dataset[Any]:
    """All labelled training images of a stream."""
    return (
        all_at_once(digits(tasks=1)).tasks[0].train
        if where == "digits"
        else FolderDataset(Path(where) / "train")
    )


def parts(data: TaskDataset, seed: int) -> tuple[list[TaskDataset], list[TaskDataset]]:
    """The tasks to learn, and the images of their classes to be asked about."""
    draw = random.Random(seed)
    enough = [own for own in positions_by_class(data) if len(own) >= COUNTS[0] + TESTED]
    chosen = draw.sample(enough, CLASSES)
    learned, asked = [], []
    for task in range(TASKS):
        taken, tested = [], []
        for count, own in zip(COUNTS, chosen[task::TASKS], strict=True):
            taken += list(own[:count])
            tested += list(own[-TESTED:])
        learned.append(present(data.subset(taken)))
        asked.append(present(data.subset(tested)))
    return learned, asked


def measured(name: str, weights: str, seed: int, data: TaskDataset) -> dict[str, float]:
    """Recalls of a method after both tasks."""
    torch.manual_seed(seed)
    learned, asked = parts(data, seed)
    config = METHODS[name].config(class_weights=weights)
    learner = ContinualLearner(
        method=config, seed=seed, augment="crop", device=Compute("cpu", workers=0).start()
    )
    for task in learned:
        learner.learn(task)
    found: dict[str, float] = {}
    for readout in ("heads", "calibrated"):
        recalls: list[list[float]] = []
        for task, tested in zip(learned, asked, strict=True):
            outputs = learner.outputs(tested)
            answers = best(class_probabilities(outputs, readout))[1].tolist()
            true = [tested.classes[target] for target in tested.targets]
            right = [learner.classes[a] == name for a, name in zip(answers, true, strict=True)]
            counts = Counter(task.classes[target] for target in task.targets)
            named = [name for name, _ in counts.most_common()]  # the rarest last
            recalls.append(
                [sum(r for r, t in zip(right, true, strict=True) if t == n) / TESTED for n in named]
            )
        found[readout] = sum(map(sum, recalls)) / CLASSES
        found[f"{readout}, rarest"] = sum(each for task in recalls for each in task[-2:]) / (2 * TASKS)
    return found


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("streams", nargs="+", metavar="digits|NAME=FOLDER")
    parser.add_argument("--methods", nargs="+", default=["duallora", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/imbalance.json"))
    asked = parser.parse_args()
    rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
    for text in asked.streams:
        name, _, folder = text.partition("=")
        data = as_task_dataset(images(folder or name))
        for seed in asked.seeds:
            for method in asked.methods:
                for weights in ("none", "balanced"):
                    key = {"stream": name, "seed": seed, "method": method, "weights": weights}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    row = key | {k: round(v, 4) for k, v in measured(method, weights, seed, data).items()}
                    rows.append(row)
                    print(row, flush=True)
                    write_atomic(asked.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
