"""Class model on ReLU random features: ridge regression on one-hot rows (after RanPAC, NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.classifiers.calibration import best_kappa
from duallora.storage.learned import ByTask, Learned

RIDGES = torch.logspace(-8, 8, 17, dtype=torch.float64)
KAPPAS = torch.logspace(0, 2, 20, dtype=torch.float64)  # 1 to 100: ridge scores lie between 0 and 1


class RandomFeatureModel(Learned):
    """Posterior over rows ``q = softmax(kappa z)``, ``z = relu(f P) W``.

    W comes from sums that add over tasks, so that it is the solution for all tasks at once.

    Args:
        dim: d, width of the final feature.
        size: M, number of random features.
        ridge: the ridge, or None to choose it by generalised cross-validation over all rows after each task.
        seed: draws P; P is saved with the model, so that no generator has to give the same numbers again.
        device: where scores are computed.
    """

    def __init__(self, dim: int, size: int, ridge: float | None, seed: int, device: torch.device) -> None:
        super().__init__(device)
        self.ridge = ridge
        drawn = torch.randn(dim, size, generator=torch.Generator().manual_seed(seed))
        self.projection: Tensor
        self.register_buffer("projection", drawn.to(device))
        self.gram: Tensor  # G = sum h^T h
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.targets: Tensor  # Q = sum h^T y
        self.register_buffer("targets", torch.zeros(size, 0, dtype=torch.float64))
        self.images: Tensor  # how many
        self.register_buffer("images", torch.tensor(0))
        self.unlabelled: Tensor | None  # those of them whose row is forgotten
        self.register_buffer("unlabelled", None)
        self.weight: Tensor  # W
        self.register_buffer("weight", torch.zeros(size, 0, device=device))
        self.fit = ByTask()  # loss of every kappa
        self.refresh()

    @property
    def losses(self) -> dict[int, Tensor]:
        """Leave-one-out loss of every kappa on each task's images."""
        return dict(self.fit.items())

    def refresh(self) -> None:
        """The temperature with the smallest loss summed over tasks; the largest among equals."""
        self.kappa = best_kappa(KAPPAS, self.losses)

    def add(self, task: int, features: Tensor, labels: Tensor, classes: int) -> None:
        """Adds final features (n, d) with labels (n,) as new rows, refits W, stores the kappa losses."""
        first = self.targets.shape[1]
        self.targets = F.pad(self.targets, (0, classes))
        for x, y in zip(features.split(1024), labels.split(1024), strict=True):
            h = self._lift(x).cpu().double()
            self.gram += h.T @ h
            self.targets.index_add_(1, y.cpu() + first, h.T.contiguous())
        self.images = self.images + len(features)
        vectors, inverse = self._solve()
        self._fit(task, features, labels + first, vectors, inverse)

    def simulate(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """A random solution for tasks with so many classes each, for measurements."""
        size, rows = len(self.gram), sum(classes)
        for task in range(len(classes)):
            self.fit[task] = torch.zeros_like(KAPPAS)
        self.weight = torch.randn(size, rows, generator=generator).div(size**0.5).to(self.device)
        self.gram = torch.eye(size, dtype=torch.float64)
        self.targets, self.images = self.weight.cpu().double(), torch.tensor(20 * rows)

    def forget(self, task: int, kept: Tensor, images: int, whole: bool) -> None:
        """Loses the rows that are not ``kept`` (R,), whose ``images`` stay in G as images of no row.

        Args:
            task: index of the task.
            kept: which rows stay, bool.
            images: how many images the others had.
            whole: the task is forgotten with all its rows, and so are its losses.
        """
        self.targets, self.weight = self.targets[:, kept], self.weight[:, kept.to(self.device)]
        lost = images if self.unlabelled is None else int(self.unlabelled) + images
        self.unlabelled = torch.tensor(lost) if lost else None
        if whole:
            self.fit.discard(task)
            self.refresh()

    def log_q(self, f: Tensor) -> Tensor:
        """Log-posterior over rows (n, R) for final features (n, d)."""
        return (self.kappa * (self._lift(f) @ self.weight)).log_softmax(1)

    def _lift(self, f: Tensor) -> Tensor:
        return (f.to(self.device).float() @ self.projection).relu()

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Refits W; returns eigenvectors (M, M) and inverse eigenvalues (M,) of ``G`` with the ridge.

        One eigendecomposition serves every ridge: ``RSS`` and ``tr H`` are sums over eigenvalues.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp(min=0)
        rotated = vectors.T @ self.targets
        images = int(self.images)
        rank = min(int((values > 1e-12 * values[-1]).sum()), images)
        known = values[len(values) - rank :]
        energy = rotated[len(values) - rank :].square().sum(1) / known  # of the n squared targets
        labelled = images - (0 if self.unlabelled is None else int(self.unlabelled))
        beyond = max(labelled - float(energy.sum()), 0.0) if rank < images else 0.0

        def validation(ridge: float) -> float:
            # Sums of what is left over: as differences, both would be round-off where the fit interpolates.
            left = ridge / (known + ridge)
            freedom = (images - rank + float(left.sum())) / images
            return (beyond + float((energy * left.square()).sum())) / freedom**2

        ridge = self.ridge if self.ridge is not None else min(RIDGES.tolist(), key=validation)
        self.weight = (vectors @ (rotated / (values + ridge)[:, None])).float().to(self.device)
        return vectors, (values + ridge).reciprocal()

    def _fit(self, task: int, features: Tensor, rows: Tensor, vectors: Tensor, inverse: Tensor) -> None:
        """Closed-form leave-one-out scores ``(z - h_ii y) / (1 - h_ii)`` of the task's images."""
        h = self._lift(features).cpu().double()
        leverage = ((h @ vectors).square() @ inverse).clamp(max=1 - 1e-6)[:, None]
        y = F.one_hot(rows.cpu(), self.targets.shape[1]).double()
        z = (h @ self.weight.cpu().double() - leverage * y) / (1 - leverage)
        losses = [-(k * z).log_softmax(1).gather(1, rows.cpu()[:, None]).sum() for k in KAPPAS.tolist()]
        self.fit[task] = torch.stack(losses)
        self.refresh()
