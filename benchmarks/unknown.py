"""How well the familiarity of an image tells that its class has not been learned, lesson after lesson.

    python benchmarks/unknown.py DATA --streams gtsrb seedlings --out results/unknown

DATA holds a folder of that name for each stream, with images in ``train/<class>/`` and ``val/<class>/``. The
embedded backbone learns the lessons of a stream, each from the first images of its classes; every tenth of
them is held back, as ``duallora learn`` does. After each lesson, images of val/ are asked about: those of the
classes learned so far are known, those of classes of later lessons near, those of the other streams far.
Three scores are compared (higher is more familiar): the familiarity, the largest class probability (maximum
softmax; Hendrycks and Gimpel 2017), and the negative Mahalanobis distance of the final feature to the nearest
class mean under the shared covariance (Lee et al. 2018). The last lesson is never taught: it stays near.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from duallora import METHODS, ContinualLearner
from duallora.classifiers.covariance import shrunk
from duallora.outputs import Outputs, unknown_thresholds
from duallora.predictions import best, class_probabilities, task_probabilities
from duallora.runtime.compute import Compute
from duallora.storage.atomic import write_atomic
from duallora.streams import FolderDataset, hold_back, split
from duallora.streams.task import TaskDataset, as_task_dataset, positions_by_class
from duallora.teaching.measure import Measured

LESSONS = {"seedlings": 4, "gtsrb": 4}
TRAINED, ASKED, FAR = 20, 10, 3  # images of a class
CLASSES = 12  # of a stream, the first by name
SCORES = ("familiarity", "maximum softmax", "Mahalanobis")


def first(data: TaskDataset, count: int) -> TaskDataset:
    """The first so many images of every class."""
    return data.subset([i for own in positions_by_class(data) for i in list(own)[:count]])


def mahalanobis(learner: ContinualLearner, features: Tensor) -> Tensor:
    """Negative distance (n,) of final features (n, d) to the nearest class mean."""
    moments, d = learner.method.rows.moments, learner.backbone.feature_dim
    covariance = shrunk(moments.scatter[:d, :d], learner.method.rows.freedom)
    factor = torch.linalg.cholesky(covariance)

    def white(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, x.double().T, upper=False).T

    return -torch.cdist(white(features), white(moments.mean[:, :d])).min(1).values


def scores(learner: ContinualLearner, outputs: Outputs) -> dict[str, Tensor]:
    """How familiar images are, by each of the three."""
    values = (
        outputs.familiarity,
        best(class_probabilities(outputs))[0],
        mahalanobis(learner, outputs.features),
    )
    return dict(zip(SCORES, (each.double() for each in values), strict=True))


def compared(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """AUROC, and the share of unknown images that are taken for known where 95 % of the known are."""
    both = torch.cat([known, unknown])
    ranks = both.unique(return_inverse=True)[1] / len(both)  # ranks lie in [0, 1), as torchmetrics wants
    labels = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))]).long()
    false, true, _ = binary_roc(ranks, labels)
    return {"auroc": float(binary_auroc(ranks, labels)), "fpr95": float(false[true >= 0.95].min())}


def called(learner: ContinualLearner, outputs: Outputs) -> float:
    """Share of images called unknown by ``--unknown-below auto``."""
    names = [task.name for task in learner.tasks]
    below = unknown_thresholds(learner.tasks)
    limits = torch.tensor(
        [below[names[t]] for t in best(task_probabilities(outputs, len(names)))[1].tolist()]
    )
    return float((outputs.familiarity < limits).double().mean())


def study(name: str, data: Path, others: list[str], seed: int, method: str) -> list[dict[str, Any]]:
    """The figures of a stream after each lesson."""
    train, val = (as_task_dataset(FolderDataset(data / name / part)) for part in ("train", "val"))
    stream = split(
        first(train, TRAINED),
        LESSONS[name],
        test=first(val, ASKED),
        order_seed=1993 + seed,
        classes=CLASSES,
        name=name,
    )
    learner = ContinualLearner(
        method=METHODS[method].config(), seed=seed, device=Compute("cpu", workers=0).start()
    )
    far = [first(as_task_dataset(FolderDataset(data / other / "val")), FAR) for other in others]
    rows = []
    for t, task in enumerate(stream.tasks[:-1]):
        kept, held = hold_back(task.train)
        learner.learn(kept, held_back=held)
        Measured.on(learner, held).note(learner)  # type: ignore[union-attr]
        sets = {
            "known": [each.test for each in stream.tasks[: t + 1]],
            "near": [each.test for each in stream.tasks[t + 1 :]],
            "far": far,
        }
        outputs = {kind: [learner.outputs(view) for view in views] for kind, views in sets.items()}
        found = {
            kind: {score: torch.cat([scores(learner, each)[score] for each in parts]) for score in SCORES}
            for kind, parts in outputs.items()
        }
        row: dict[str, Any] = {"stream": name, "seed": seed, "method": method, "lesson": t + 1}
        row["images"] = {kind: len(values[SCORES[0]]) for kind, values in found.items()}
        row["auto"] = {
            kind: sum(called(learner, each) * len(each.familiarity) for each in parts) / row["images"][kind]
            for kind, parts in outputs.items()
        }
        for kind in ("near", "far"):
            row[kind] = {s: compared(found["known"][s], found[kind][s]) for s in SCORES}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a page of Markdown, mean over seeds."""
    keys = list(dict.fromkeys((r["method"], r["stream"], r["lesson"]) for r in rows))
    lines = [
        "| method | stream | lesson | score | near AUROC | near FPR95 | far AUROC | far FPR95 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    auto = [
        "| method | stream | lesson | known called unknown % | near % | far % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in keys:
        own = [r for r in rows if (r["method"], r["stream"], r["lesson"]) == key]
        place = " | ".join(map(str, key))
        for score in SCORES:
            cells = [
                f"{100 * sum(r[kind][score][what] for r in own) / len(own):.1f}"
                for kind in ("near", "far")
                for what in ("auroc", "fpr95")
            ]
            lines.append(f"| {place} | {score} | " + " | ".join(cells) + " |")
        shares = [f"{100 * sum(r['auto'][k] for r in own) / len(own):.1f}" for k in ("known", "near", "far")]
        auto.append(f"| {place} | " + " | ".join(shares) + " |")
    return "\n".join([*lines, "", *auto]) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--streams", nargs="+", default=list(LESSONS))
    parser.add_argument("--methods", nargs="+", default=["duallora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("results/unknown"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    asked.out.mkdir(parents=True, exist_ok=True)
    for method in asked.methods:
        for seed in asked.seeds:
            for name in asked.streams:
                others = [other for other in LESSONS if other != name]
                rows += study(name, asked.data, others, seed, method)
                write_atomic(asked.out / "unknown.json", json.dumps(rows, indent=1).encode())
                write_atomic(asked.out / "tables.md", table(rows).encode())


if __name__ == "__main__":
    main()
