"""How well a gate on a frozen layer finds the task: where it reads, and by what it judges.

    python benchmarks/gate.py FOLDER [--out results/residual/gate.json]

FOLDER holds the images (``train/<class>/``). Images 1 to 60 of each class are learned, images 61 to 110 are
asked about; nothing is trained. For every layer and for the final feature: the share of images whose task has
the largest weight, and the mean weight of the true task. Judged by

- class: Gaussian rows, one a class, kappa fitted (the package's gate);
- sharp: the same at kappa = 1;
- task: one Gaussian a task, one covariance for all;
- own: one Gaussian a task with its own covariance;
- energy: ``|f N_j|^2 / |f|^2`` in each task's top directions (95 % of its energy outside earlier tasks').
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.adapters.dynamic_memory import EnergyMemory
from duallora.adapters.subspace import Subspace
from duallora.backbones.backbone import Backbone
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.covariance import shrunk
from duallora.data.transforms import evaluation_transform
from duallora.storage.atomic import write_atomic
from duallora.streams import TaskDataset
from residual_run import STREAMS, load

CPU = torch.device("cpu")
Reader = Callable[[Tensor], Tensor]
Set = tuple[Tensor, Tensor, int]  # features (n, d), labels inside the task (n,), number of classes


@torch.no_grad()
def tokens(backbone: Backbone, data: TaskDataset) -> dict[str, Tensor]:
    """Class token and mean patch token (n, 2 d) at the input of every attention and after the last block."""
    view = evaluation_transform(backbone.info)
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor) -> None:
        patches = x[:, backbone.num_prefix_tokens :].mean(1)
        found.setdefault(name, []).append(torch.cat([x[:, 0], patches], 1))

    handles = [
        backbone.attention(i).register_forward_pre_hook(lambda _, args, i=i: keep(f"layer {i}", args[0]))
        for i in range(1, backbone.depth)
    ]
    last = backbone.model.get_submodule("norm")
    handles.append(last.register_forward_hook(lambda _, __, x: keep("final", x)))
    for images in torch.stack([view(image) for image, _ in data]).split(64):  # type: ignore[attr-defined]
        backbone(images)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def by_class(train: list[Set], f: Tensor, kappa: float | None) -> Tensor:
    """Log-weights of the tasks (n, T) from Gaussian rows."""
    rows = ClassStatistics(f.shape[1], CPU)
    for task, (x, y, classes) in enumerate(train):
        rows.replace(task, ClassMoments.of(x, y, classes))
        rows.fit_temperature(task, x, y)
    log_q = ((rows.kappa if kappa is None else kappa) * rows.scores(f)).log_softmax(1)
    return rows.by_task(log_q)


def by_task(train: list[Set], f: Tensor) -> Tensor:
    """One Gaussian a task around its mean, one covariance for all."""
    rows = ClassStatistics(f.shape[1], CPU)
    for task, (x, y, _) in enumerate(train):
        rows.replace(task, ClassMoments.of(x, torch.zeros_like(y), 1))
        rows.fit_temperature(task, x, torch.zeros_like(y))
    return rows.by_task(rows.log_q(f))


def by_own_covariance(train: list[Set], f: Tensor) -> Tensor:
    """One Gaussian a task with a covariance of its own, shrunk as the rows' is."""
    scores = []
    for x, _, _ in train:
        x = x.double()
        centred = x - x.mean(0)
        factor = torch.linalg.cholesky(shrunk(centred.T @ centred, float(len(x) - 1)))
        z = torch.linalg.solve_triangular(factor, (f.double() - x.mean(0)).T, upper=False)
        scores.append(-z.square().sum(0) / 2 - factor.diagonal().log().sum())
    return torch.stack(scores, 1).log_softmax(1)


def by_energy(train: list[Set], f: Tensor) -> Tensor:
    """Relative energy in the tasks' own directions, as a posterior with fitted kappa."""
    subspace = Subspace(f.shape[1])
    memory = EnergyMemory(subspace, CPU)
    for task, (x, _, _) in enumerate(train):
        subspace.grow(x.double().T @ x.double() / len(x), 0.95)
        memory.replace(task, subspace.block(task), x)
        memory.fit_temperature(task, x)
    return memory.log_posterior(f)


def study(stream: str, folder: str) -> dict[str, Any]:
    """Figures of all places and judges on one stream."""
    setting = load({"test": "held_back", "train_per_class": 60}, stream, folder)
    backbone, dim = setting.backbone, setting.backbone.dim
    sets = [(tokens(backbone, task.train), tokens(backbone, task.test)) for task in setting.stream]
    labels = [torch.tensor(task.train.targets) for task in setting.stream]
    classes = [len(task.train.classes) for task in setting.stream]
    truth = torch.cat([torch.full((len(test["final"]),), t) for t, (_, test) in enumerate(sets)])
    reads: dict[str, Reader] = {
        "class token": lambda x: x[:, :dim],
        "mean patch": lambda x: x[:, dim:],
        "both": lambda x: x,
    }
    found: dict[str, Any] = {}
    for place in sets[0][0]:
        for name, read in reads.items():
            train = [(read(x[place]), y, k) for (x, _), y, k in zip(sets, labels, classes, strict=True)]
            f = torch.cat([read(test[place]) for _, test in sets])
            judged = {
                "class": by_class(train, f, None),
                "sharp": by_class(train, f, 1.0),
                "task": by_task(train, f),
                "own": by_own_covariance(train, f),
                "energy": by_energy(train, f),
            }
            found[f"{place}, {name}"] = {
                judge: {
                    "accuracy": float((w.argmax(1) == truth).double().mean()),
                    "own_weight": float(w.exp().gather(1, truth[:, None]).mean()),
                }
                for judge, w in judged.items()
            }
    return found


def main() -> int:
    """All streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with train/<class>/")
    parser.add_argument("--out", type=Path, default=Path("results/residual/gate.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found = {stream: study(stream, asked.folder) for stream in STREAMS}
    write_atomic(asked.out, (json.dumps(found, indent=1) + "\n").encode())
    for stream, places in found.items():
        print(f"| {stream} | " + " | ".join(next(iter(places.values()))) + " |")
        for place, judged in places.items():
            print(f"| {place} | " + " | ".join(f"{100 * j['accuracy']:.1f}" for j in judged.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
