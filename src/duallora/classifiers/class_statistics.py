"""Class statistics: count, mean and pooled scatter of every row, and what they say of a feature.

A *row* is a (task, class) pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.classifiers.calibration import best_kappa
from duallora.classifiers.covariance import shrunk
from duallora.classifiers.gaussian import Own, SharedGaussian
from duallora.classifiers.log_probabilities import sum_rows
from duallora.storage.learned import ByTask, Learned

KAPPAS = torch.logspace(-1.3010299956639813, 0, 20, dtype=torch.float64)  # .05 to 1
_CHUNK = 4096  # features are merged in chunks of this many, so that fp64 copies stay small


@dataclass
class ClassMoments:
    """Count (k,), mean (k, d) of each class and pooled within-class scatter (d, d), fp64.

    Moments of batches, ranks and tasks merge into those of all their images.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, classes: int, dim: int) -> ClassMoments:
        """Moments of no images at all."""
        zeros = torch.zeros
        return cls(
            zeros(classes, dtype=torch.float64),
            zeros(classes, dim, dtype=torch.float64),
            zeros(dim, dim, dtype=torch.float64),
        )

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassMoments:
        """Moments of ``features`` (n, d) with ``labels`` (n,) in ``range(classes)``, merged in chunks."""
        total = cls.empty(classes, features.shape[1])
        for x, y in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            # On a GPU the large product stays there; a sum by index would not be the same every time.
            fast = x.is_cuda
            x, y = (x if fast else x.cpu()).double(), y.to(x.device) if fast else y.cpu()
            count = torch.bincount(y, minlength=classes).double()
            if fast:
                summed = F.one_hot(y, classes).double().T @ x
            else:
                summed = torch.zeros_like(total.mean).index_add_(0, y, x)
            mean = summed / count.clamp(min=1)[:, None]
            centred = x - mean[y]
            total = total.merge(cls(count.cpu(), mean.cpu(), (centred.T @ centred).cpu()))
        return total

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Chan's update: moments of both sets together, without the cancellation of ``E[x^2] - mu^2``."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        gap = other.mean - self.mean
        between = gap.T @ (gap * (self.count * share)[:, None])
        return ClassMoments(count, self.mean + gap * share[:, None], self.scatter + other.scatter + between)


class ByRow(Learned):
    """What a method keeps of every row beside its class statistics."""

    def forget(self, kept: Tensor) -> None:
        """Loses rows; ``kept`` (R,), bool, says which stay."""
        raise NotImplementedError

    def simulate(self, rows: int) -> None:
        """So many rows of no meaning, for measurements."""
        raise NotImplementedError


class ClassStatistics(Learned):
    """Gaussian rows at one feature point, with the temperature kappa and the distances of known images.

    Args:
        dim: width of the features.
        device: where scores are computed; the statistics stay on the CPU in fp64.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"forgotten", "shrinks"})

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(device)
        self.dim = dim
        none = ClassMoments.empty(0, dim)
        self.task: Tensor
        self.register_buffer("task", torch.zeros(0, dtype=torch.long))
        self.count: Tensor
        self.register_buffer("count", none.count)
        self.mean: Tensor
        self.register_buffer("mean", none.mean)
        self.scatter: Tensor
        self.register_buffer("scatter", none.scatter)
        # Tasks and degrees of freedom, where forgotten rows left more of them than the rows show.
        self.forgotten: Tensor | None
        self.register_buffer("forgotten", None)
        # There where scores know how many images a row has: rows that were saved before they did answer as
        # they have, until the next task.
        self.shrinks: Tensor | None
        self.register_buffer("shrinks", torch.tensor([True]))
        # Of each task's own images: the loss of every kappa, never recomputed, then q95 and standard
        # deviation of their distances.
        self.fit = ByTask()
        self.tasks = 0  # learned so far, forgotten ones included
        self._lost = 0.0  # degrees of freedom that forgotten rows left in the scatter
        self._before = none.scatter  # scatter without the latest task
        self._update()

    @property
    def moments(self) -> ClassMoments:
        """Count, mean and scatter of the rows."""
        return ClassMoments(self.count, self.mean, self.scatter)

    @moments.setter
    def moments(self, new: ClassMoments) -> None:
        self.count, self.mean, self.scatter = new.count, new.mean, new.scatter

    @property
    def losses(self) -> dict[int, Tensor]:
        """Loss of every kappa on each task's own images."""
        return {task: values[:-2] for task, values in self.fit.items()}

    @property
    def distances(self) -> dict[int, tuple[float, float]]:
        """(q95, standard deviation) of the distances of each task's own images."""
        return {task: (float(values[-2]), float(values[-1])) for task, values in self.fit.items()}

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the pooled scatter, to which forgotten rows still count."""
        return float(self.moments.count.sum()) - len(self.moments.count) + self._lost

    @property
    def reference(self) -> Tensor:
        """Mean (d,) of the rows of the first task that has any; linear classifiers are seen from there."""
        return self.moments.mean[self.task == self.task[0]].mean(0)

    @property
    def _with_rows(self) -> int:
        """Tasks up to the last one that has rows."""
        return int(self.task[-1]) + 1 if len(self.task) else 0

    def replace(self, task: int, new: ClassMoments) -> None:
        """Adds the rows of ``task``; those of an earlier pass over the same task are replaced."""
        if task != self.tasks - 1:
            self._before = self.moments.scatter
        self.shrinks = torch.tensor([True])
        old = self.task < task
        count, mean = self.moments.count[old], self.moments.mean[old]
        self.task = torch.cat([self.task[old], torch.full((len(new.count),), task)])
        self.moments = ClassMoments(
            torch.cat([count, new.count]), torch.cat([mean, new.mean]), self._before + new.scatter
        )
        self.tasks = task + 1
        self._update()

    @property
    def latest_scatter(self) -> Tensor:
        """What the latest task has added to the scatter (d, d)."""
        return self.scatter - self._before

    def exchange(self, task: int, mean: Tensor, fit: Tensor, scatter: Tensor) -> None:
        """Gives a task other rows.

        Args:
            task: its index.
            mean: of its rows (k, d).
            fit: losses and distances of its images.
            scatter: what is added to that of all rows (d, d).
        """
        means = self.mean.clone()
        means[self.task == task] = mean
        self.moments = ClassMoments(self.count, means, self.scatter + scatter)
        self.fit[task] = fit
        self._update()

    def staying(self, task: int, kept: Tensor) -> Tensor:
        """Which of all rows stay (R,), where of those of ``task`` only ``kept`` (k,) do."""
        stays = torch.ones(len(self.task), dtype=torch.bool)
        stays[self.task == task] = kept.cpu()
        return stays

    def forget(self, task: int, kept: Tensor) -> None:
        """Loses rows of ``task``, and with the last of them its losses and distances.

        The scatter is a sum over all images and keeps their share, with its degrees of freedom.

        Args:
            task: its index.
            kept: which of its rows stay (k,), bool.
        """
        m, stays = self.moments, self.staying(task, kept)
        self._lost += float((m.count[~stays] - 1).sum())
        self.task = self.task[stays]
        self.moments = ClassMoments(m.count[stays], m.mean[stays], m.scatter)
        if not bool(kept.any()):
            self.fit.discard(task)
        self._update()

    def fit_temperature(self, task: int, features: Tensor, labels: Tensor) -> None:
        """Stores kappa losses and distances of ``task`` from its images (n, d), against the present rows."""
        own = self.own(task, labels, features)
        counted = self.counted(own)
        losses = [each[counted].sum() for each in self.left_out_losses(features, own)]
        nearest = self._gaussian.unseen_distance(features, own, self.freedom)[counted].double()
        if len(nearest):
            spread = float(nearest.std(unbiased=False))
            q95 = float(nearest.quantile(0.95))
            distance = (q95, max(spread, 1e-3 * q95, 1e-12))
        else:
            # No image to leave out: a Gaussian of d dimensions lies sqrt(d) +- 1/sqrt(2) from its mean.
            distance = (self.dim**0.5, 2**-0.5)
        self.fit[task] = torch.cat([torch.stack(losses), torch.tensor(distance, dtype=torch.float64)])
        self._tabulate()

    def left_out_losses(self, f: Tensor, own: Own) -> list[Tensor]:
        """Loss (n,) of each image left out of its own row for every kappa, fp64; see :meth:`counted`."""
        scores, row = self.scores(f, own).cpu().double(), own.row.cpu()
        return [-(k * scores).log_softmax(1).gather(1, row[:, None])[:, 0] for k in KAPPAS.tolist()]

    def counted(self, own: Own) -> Tensor:
        """Which images (n,) have others in their rows: without any there is no row to be named by."""
        return (self._gaussian.count[own.row] > 1).cpu()

    def own(self, task: int, labels: Tensor, f0: Tensor) -> Own:
        """Rows and features for leave-one-out scores of images with ``labels`` (n,) inside ``task``."""
        return Own(labels.to(self.device) + self._first[task], f0.to(self.device))

    def scores(self, f: Tensor, own: Own | None = None) -> Tensor:
        """Row scores ``s`` (n, R) up to a constant per image; ``own`` leaves each image out of its row."""
        return self._gaussian.scores(self.whitened(f), own)

    def shares(self, count: Tensor) -> Tensor:
        """Share of ``nu`` that scores take of rows with so many images each (k,); see ``few_images``."""
        return self._gaussian.shares(count)

    def log_q(self, f: Tensor, own: Own | None = None) -> Tensor:
        """Log-posterior over rows (n, R), uniform prior over rows."""
        return (self.kappa * self.scores(f, own)).log_softmax(1)

    def task_weights(self, f: Tensor, own: Own | None = None) -> Tensor:
        """Posterior over tasks (n, T): :meth:`log_q` summed over the rows of each, not as logs."""
        weights: Tensor = (self.kappa * self.scores(f, own)).softmax(1) @ self._member
        return weights

    def by_task(self, log_q: Tensor) -> Tensor:
        """Log-posterior over tasks (n, T) from that over rows."""
        return sum_rows(log_q, self.row_task, self.tasks)

    def distance(self, f: Tensor, own: Own | None = None) -> tuple[Tensor, Tensor]:
        """Smallest Mahalanobis distance to a row's mean (n,) and the row it belongs to (n,)."""
        return self._gaussian.nearest(self.whitened(f), own)

    def posterior_and_familiarity(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`log_q` (n, R) and :meth:`familiarity` (n,), from one look at the features."""
        z = self.whitened(f)
        scores, nearest = self._gaussian.scores_and_nearest(z)
        return (self.kappa * scores).log_softmax(1), self._familiarity(*nearest)

    def familiarity(self, f: Tensor) -> Tensor:
        """``sigmoid((q95 - m) / s)`` (n,), q95 and s of the nearest row's task."""
        return self._familiarity(*self.distance(f))

    def _familiarity(self, nearest: Tensor, row: Tensor) -> Tensor:
        q95, spread = self._table[self.row_task[row]].unbind(1)
        return ((q95 - nearest) / spread).sigmoid()

    def linear(self, task: int) -> tuple[Tensor, Tensor]:
        """Weight (k, d) and bias (k,) of the linear classifier that the rows of ``task`` make: ``kappa s``.

        Seen from :attr:`reference`, which no later task changes: so far as the covariance stays as it is,
        classifiers of several tasks can be compared.
        """
        centre = self.reference.float().to(self.device)
        mine = (self.task == task).to(self.device)
        known = self._gaussian
        nu = known.counted[mine] + (known.centre - centre) @ known.map
        weight = self.kappa * nu @ known.map.T
        return weight, -(weight @ centre) - self.kappa * nu.square().sum(1) / 2

    def seen_from(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """What a classifier seen from ``old`` (d,) lacks to be one seen from :attr:`reference`.

        Returns:
            Weight (d,) and bias () of ``kappa (f S^-1 (c - c')^T + (c' S^-1 c'^T - c S^-1 c^T) / 2)``, old c,
            new c', S the covariance: the same for all rows, so that no probability over them changes.
        """
        before, after = (self.whitened(c.to(self.device)) for c in (old, self.reference))
        weight: Tensor = self.kappa * (before - after) @ self._gaussian.map.T
        bias: Tensor = self.kappa * (after.square().sum() - before.square().sum()) / 2
        return weight, bias - weight @ self._gaussian.centre

    def move(self, drift: Tensor, mean: Tensor | None = None) -> None:
        """Moves all rows by the linear map M = ``drift`` (d, d): ``mu M``, ``M^T scatter M`` (after SLDC).

        Args:
            drift: M.
            mean: where the means (R, d) go, if ``drift`` only approximates a map; None is ``mu M``.
        """
        m = self.moments
        mean = m.mean @ drift if mean is None else mean
        self.moments = ClassMoments(m.count, mean, drift.T @ m.scatter @ drift)
        self._before = drift.T @ self._before @ drift
        self._update()

    def simulate(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """Random rows in place of learned ones, for measurements.

        Args:
            classes: rows of each task.
            generator: draws the means.
        """
        rows, each = sum(classes), 20
        self.tasks = len(classes)
        self.task = torch.arange(self.tasks).repeat_interleave(torch.tensor(classes))
        self.moments = ClassMoments(
            torch.full((rows,), float(each), dtype=torch.float64),
            torch.randn(rows, self.dim, generator=generator).double(),
            torch.eye(self.dim, dtype=torch.float64) * rows * (each - 1),
        )
        self._before = self.moments.scatter
        unknown = torch.tensor([self.dim**0.5, 2**-0.5], dtype=torch.float64)
        for task in range(len(classes)):
            self.fit[task] = torch.cat([torch.zeros_like(KAPPAS), unknown])
        self._update()

    def whitened(self, f: Tensor) -> Tensor:
        """Features (n, d) in coordinates in which the covariance is the identity, around the mean row."""
        return self._gaussian.whitened(f)

    def _tabulate(self) -> None:
        """Chooses kappa, and lays (q95, standard deviation) out by task (T, 2), where scores are computed."""
        # The temperature with the smallest loss summed over tasks; the largest among equals.
        self.kappa = best_kappa(KAPPAS, self.losses)
        unknown, known = (self.dim**0.5, 2**-0.5), self.distances
        table = [known.get(t, unknown) for t in range(self.tasks)]
        self._table = torch.tensor(table, device=self.device).reshape(-1, 2)

    def refresh(self) -> None:
        """Everything that scores need, on their device, from the buffers."""
        lost = self.forgotten
        self.tasks, self._lost = (self._with_rows, 0.0) if lost is None else (int(lost[0]), float(lost[1]))
        self._update()

    def _update(self) -> None:
        """The same where buffers changed by more than a load: whenever rows do, never while scoring."""
        m = self.moments
        more = self._lost or self.tasks != self._with_rows
        self.forgotten = torch.tensor([self.tasks, self._lost], dtype=torch.float64) if more else None
        self._first = [int((self.task < t).sum()) for t in range(self.tasks)]
        self.row_task = self.task.to(self.device)
        self._member = F.one_hot(self.row_task, max(self.tasks, 1)).float()
        self._tabulate()
        covariance = self._covariance() if len(self.task) else None
        self._gaussian = SharedGaussian(
            m.mean, m.count, covariance, self.device, shrinks=self.shrinks is not None
        )

    def _covariance(self) -> tuple[Tensor, Tensor]:
        """Within-class covariance (d, d), as it was found and shrunk."""
        m = self.moments
        scatter, freedom = m.scatter, self.freedom
        if freedom < 1:  # single images say nothing of the spread in a class: as wide as that between them
            scatter, freedom = torch.diag((m.mean - m.mean.mean(0)).square().sum(0)), max(len(m.mean) - 1, 1)
        return scatter / freedom, shrunk(scatter, freedom)
