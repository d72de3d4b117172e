"""Class statistics written out in fp64, row by row and image by image."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics

DIM, CPU = 6, torch.device("cpu")
near = partial(assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)


def task_images(classes: int, per_class: int, seed: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that temperatures and posteriors are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * per_class) % classes
    centres = torch.randn(classes, DIM, generator=generator)
    shape = torch.linspace(0.3, 1.5, DIM)
    return centres[labels] + spread * shape * torch.randn(len(labels), DIM, generator=generator), labels


def naive_moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    features, scatter = (
        features.double(),
        torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64),
    )
    mean = torch.stack([features[labels == c].mean(0) for c in range(classes)])
    for f, c in zip(features, labels.tolist(), strict=True):
        scatter += torch.outer(f - mean[c], f - mean[c])
    return mean, scatter


def naive_covariance(scatter: Tensor, freedom: int) -> Tensor:
    """The covariance shrunk to its diagonal, entry by entry."""
    dim = len(scatter)
    weight = sorted([1e-4, (dim / freedom) ** 1.5 / 2, 10.0])[1]
    sigma = scatter / freedom
    variances = [float(sigma[j, j]) for j in range(dim)]
    floor = max(sum(variances) / dim / 1000, 1e-4)
    for j, variance in enumerate(variances):
        sigma[j, j] += weight * max(variance, floor)
    return sigma


class Naive:
    """Rows of several tasks, every quantity by its definition, image by image."""

    def __init__(self, tasks: list[tuple[Tensor, Tensor]]) -> None:
        self.tasks = [(f.double(), y) for f, y in tasks]
        self.row_task = torch.tensor([t for t, (_, y) in enumerate(tasks) for _ in range(int(y.max()) + 1)])
        self.count = torch.cat([torch.bincount(y) for _, y in tasks])
        parts = [naive_moments(f, y, int(y.max()) + 1) for f, y in tasks]
        self.mean = torch.cat([mean for mean, _ in parts])
        scatter = sum(scatter for _, scatter in parts)
        self.sigma = naive_covariance(scatter, max(int(self.count.sum()) - len(self.count), 1))
        self.inverse = torch.linalg.inv(self.sigma)
        self.centre = self.mean.mean(0)
        freedom = max(int(self.count.sum()) - len(self.count), 1)
        self.trace = float((self.inverse @ scatter / freedom).trace())
        self.between = self.spread_of_means()

    def spread_of_means(self) -> float:
        """b of the analysis of variance, row by row."""
        total, rows = int(self.count.sum()), len(self.count)
        centre = sum(n * mu for n, mu in zip(self.count.tolist(), self.mean, strict=True)) / total
        between = sum(
            n * float((mu - centre) @ self.inverse @ (mu - centre))
            for n, mu in zip(self.count.tolist(), self.mean, strict=True)
        )
        return max(between - (rows - 1) * self.trace, 0) / (total - float((self.count**2).sum()) / total)

    def share(self, n: int) -> float:
        """How much of a row's offset counts where its mean comes from n images."""
        best, most = (k * self.between / (k * self.between + self.trace) for k in (n, int(self.count.max())))
        return best / most

    def mean_without(self, row: int, f0: Tensor) -> Tensor:
        """The row's mean recomputed from its other images."""
        task = int(self.row_task[row])
        features, labels = self.tasks[task]
        label = row - int((self.row_task < task).sum())
        others = [
            f for f, y in zip(features, labels.tolist(), strict=True) if y == label and not torch.equal(f, f0)
        ]
        assert len(others) == int(self.count[row]) - 1
        return torch.stack(others).mean(0)

    def scores(self, f: Tensor, mean: Tensor | None = None, without: int | None = None) -> Tensor:
        """Scores around the centre of the rows; the mean of the row ``without`` has an image less."""
        mean, f, found = self.mean if mean is None else mean, f.double() - self.centre, []
        for row, mu in enumerate(mean):
            nu = self.share(int(self.count[row]) - (row == without)) * (mu - self.centre)
            found.append(f @ self.inverse @ nu - nu @ self.inverse @ nu / 2)
        return torch.stack(found)

    def distances(self, f: Tensor, mean: Tensor | None = None) -> Tensor:
        mean = self.mean if mean is None else mean
        return torch.stack([((f.double() - mu) @ self.inverse @ (f.double() - mu)).sqrt() for mu in mean])

    def unseen(self, row: int, f0: Tensor) -> float:
        """Smallest distance with the image taken out of its row's mean and out of the covariance."""
        others, v = self.mean_without(row, f0), f0 - self.mean[row]
        scatter = (int(self.count[row]) - 1) * torch.outer(others - self.mean[row], others - self.mean[row])
        share = (torch.outer(v, v) + scatter) / (int(self.count.sum()) - len(self.count))
        inverse = torch.linalg.inv(self.sigma - share)
        return min(float(((f0 - mu) @ inverse @ (f0 - mu)).sqrt()) for mu in self.left_out(row, f0))

    def left_out(self, row: int, f0: Tensor) -> Tensor:
        """All means, that of ``row`` without the image."""
        mean = self.mean.clone()
        mean[row] = self.mean_without(row, f0)
        return mean

    def losses(self, task: int) -> list[float]:
        """Sum of ``-log q(own row)`` on leave-one-out scores for each temperature."""
        features, labels = self.tasks[task]
        first, result = int((self.row_task < task).sum()), []
        for kappa in [0.05 * 20 ** (i / 19) for i in range(20)]:
            loss = 0.0
            for f, label in zip(features, labels.tolist(), strict=True):
                row = first + label
                if self.count[row] == 1:
                    continue
                scores = kappa * self.scores(f, self.left_out(row, f), row)
                loss -= float(scores[row] - scores.exp().sum().log())
            result.append(loss)
        return result


def learned(tasks: list[tuple[Tensor, Tensor]]) -> ClassStatistics:
    memory = ClassStatistics(tasks[0][0].shape[1], CPU)
    for task, (features, labels) in enumerate(tasks):
        memory.replace(task, ClassMoments.of(features, labels, int(labels.max()) + 1))
        memory.fit_temperature(task, features, labels)
    return memory
