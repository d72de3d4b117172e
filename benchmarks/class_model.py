"""What a class model gets out of frozen features: what it reads, how its covariance is shrunk.

    python benchmarks/class_model.py FOLDER [--out results/residual/class_model.json]

FOLDER holds the images (``train/<class>/``). Images 1 to 60 of each class are learned, images 61 to 110 are
asked about; nothing is trained. First the final accuracy of rows that read more and more of one pass, and
of ridge regression on random features (RanPAC's classifier). Then that of the rows for sets of fewer images,
with the covariance ``Sigma_0 + l diag(Sigma_0)`` at seven values of l, and at the one that the package takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.covariance import shrunk
from duallora.classifiers.random_features import RandomFeatureModel
from duallora.data.transforms import evaluation_transform
from duallora.storage.atomic import write_atomic
from duallora.streams import TaskDataset
from residual_run import load

CPU = torch.device("cpu")
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SETS = (
    (100, 60),
    (100, 20),
    (100, 5),
    (20, 60),
    (20, 20),
    (20, 5),
    (10, 20),
    (5, 10),
    (2, 10),
)  # classes, images
DEEPER = 4  # a layer more


@torch.no_grad()
def features(backbone: Backbone, data: TaskDataset) -> Tensor:
    """What the package reads (n, row_dim), beside it both tokens at the input of layer ``DEEPER``."""
    view, more = evaluation_transform(backbone.info), []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        more.append(torch.cat([x[:, 0], x[:, backbone.num_prefix_tokens :].mean(1)], 1))

    handle = backbone.attention(DEEPER).register_forward_pre_hook(keep)
    images = torch.stack([view(image) for image, _ in data])  # type: ignore[attr-defined]
    read = torch.cat([backbone(batch) for batch in images.split(64)])
    handle.remove()
    return torch.cat([read, torch.cat(more)], 1)


class Stream:
    """Frozen features of a stream's training and test images, with their rows and classes."""

    def __init__(self, name: str, folder: str) -> None:
        setting = load({"test": "held_back", "train_per_class": 60}, name, folder)
        self.backbone, self.tasks = setting.backbone, list(setting.stream)
        self.train = [features(self.backbone, task.train) for task in self.tasks]
        self.test = torch.cat([features(self.backbone, task.test) for task in self.tasks])
        counts = [len(task.train.classes) for task in self.tasks]
        names = [c for task in self.tasks for c in task.train.classes]
        self.row_class = torch.tensor([sorted(set(names)).index(c) for c in names])
        self.first = [sum(counts[:t]) for t in range(len(counts))]
        self.truth = torch.cat(
            [torch.tensor(t.test.targets) + first for t, first in zip(self.tasks, self.first, strict=True)]
        )

    def accuracy(self, log_q: Tensor) -> float:
        """Of the class with the largest sum over its rows."""
        total = log_q.new_zeros(len(log_q), int(self.row_class.max()) + 1).index_add_(
            1, self.row_class, log_q.exp()
        )
        return float((total.argmax(1) == self.row_class[self.truth]).double().mean())

    def rows(self, columns: slice) -> Tensor:
        """Log-posterior of Gaussian rows on some columns (n, R)."""
        rows = ClassStatistics(self.test[:, columns].shape[1], CPU)
        for t, (f, task) in enumerate(zip(self.train, self.tasks, strict=True)):
            y = torch.tensor(task.train.targets)
            rows.replace(t, ClassMoments.of(f[:, columns], y, len(task.train.classes)))
            rows.fit_temperature(t, f[:, columns], y)
        return rows.log_q(self.test[:, columns])

    def ridge(self, columns: slice) -> Tensor:
        """Log-posterior of ridge regression on 2,000 random features of some columns (n, R)."""
        model = RandomFeatureModel(self.test[:, columns].shape[1], 2000, None, 0, CPU)
        for t, (f, task) in enumerate(zip(self.train, self.tasks, strict=True)):
            model.add(t, f[:, columns], torch.tensor(task.train.targets), len(task.train.classes))
        return model.log_q(self.test[:, columns])

    def shrinkage(self, classes: int, images: int, columns: slice) -> dict[str, float]:
        """Accuracy of the first rows from their first images, by the weight of the diagonal."""
        x = torch.cat(self.train)[:, columns].double()
        y = torch.cat(
            [torch.tensor(t.train.targets) + f for t, f in zip(self.tasks, self.first, strict=True)]
        )
        kept = torch.cat([(y == c).nonzero()[:images, 0] for c in range(classes)])
        moments = ClassMoments.of(x[kept], y[kept], classes)
        asked = self.truth < classes
        freedom = float(len(kept) - classes)
        sigma = moments.scatter / freedom
        spread = torch.diag(sigma.diagonal().clamp(min=1e-9))
        found = {}
        for weight in (*WEIGHTS, None):
            used = shrunk(moments.scatter, freedom) if weight is None else sigma + weight * spread
            solved = torch.linalg.solve(used, moments.mean.T)
            scores = self.test[asked][:, columns].double() @ solved - (moments.mean * solved.T).sum(1) / 2
            right = (scores.argmax(1) == self.truth[asked]).double().mean()
            found["package" if weight is None else str(weight)] = float(right)
        return found


def study(name: str, folder: str) -> dict[str, Any]:
    """All figures of one stream."""
    stream = Stream(name, folder)
    final, dim = stream.backbone.feature_dim, stream.backbone.row_dim
    reads = {"final": final, "last layer": 2 * final, "package": dim, f"and layer {DEEPER}": None}
    found: dict[str, Any] = {f"rows, {n}": stream.accuracy(stream.rows(slice(w))) for n, w in reads.items()}
    for n, w in (("final", final), ("package", dim)):
        ridge = stream.ridge(slice(w))
        found[f"ridge, {n}"] = stream.accuracy(ridge)
        both = (stream.rows(slice(w)) + ridge) / 2
        found[f"rows and ridge, {n}"] = stream.accuracy(both.log_softmax(1))
    found["shrinkage"] = {
        f"{classes} classes of {images} images, {n}": stream.shrinkage(classes, images, slice(w))
        for classes, images in SETS
        for n, w in (("final", final), ("package", dim))
    }
    return found


def main() -> int:
    """Two streams: the semantic one has the rows of the random one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with train/<class>/")
    parser.add_argument("--out", type=Path, default=Path("results/residual/class_model.json"))
    asked = parser.parse_args()
    found = {name: study(name, asked.folder) for name in ("random", "domains")}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(asked.out, (json.dumps(found, indent=1) + "\n").encode())
    for name, figures in found.items():
        for what, value in figures.items():
            if what != "shrinkage":
                print(f"{name}: {what}: {100 * value:.1f}")
        for what, values in figures["shrinkage"].items():
            print(f"{name}: {what}: " + " ".join(f"{k}: {100 * v:.1f}" for k, v in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
