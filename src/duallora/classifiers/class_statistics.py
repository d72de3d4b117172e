"""Class statistics: rows with one shared covariance, the posterior they give, and how familiar an input is.

A *row* is a (task, class) pair. In the coordinates ``z = (f - m) C^-T`` with ``Sigma = C C^T`` (m: mean of
the row means) the score ``s_c = f Sigma^-1 mu_c^T - 1/2 mu_c Sigma^-1 mu_c^T`` is ``z nu_c^T - |nu_c|^2 / 2``
up to a term that is the same for all rows, and the Mahalanobis distance is ``|z - nu_c|``: one triangular
solve in fp64 when rows change, small fp32 products afterwards. In scores, rows of few images beside rows of
many count with a share of their ``nu_c`` only (``few_images``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.classifiers.covariance import shrunk, whitening
from duallora.classifiers.few_images import shares, spread_of_means

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


class Own(NamedTuple):
    """For leave-one-out scores: each image's own row (n,) and its feature f0 (n, d) in the latest pass."""

    row: Tensor
    f0: Tensor


class RowMemory:
    """Gaussian rows at one feature point, with the temperature kappa and the distances of known images.

    Args:
        dim: width of the features.
        device: where scores are computed; the statistics stay on the CPU in fp64.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim, self.device = dim, device
        self.task = torch.zeros(0, dtype=torch.long)
        self.moments = ClassMoments.empty(0, dim)
        self.losses: dict[int, Tensor] = {}  # loss of every kappa on each task's images, never recomputed
        # (q95, standard deviation) of each task's own images
        self.distances: dict[int, tuple[float, float]] = {}
        self.tasks = 0  # learned so far, forgotten ones included
        self._forgotten = 0.0  # degrees of freedom that forgotten rows left in the scatter
        self._before = self.moments.scatter  # scatter without the latest task
        self.shrinks = True  # whether scores know how many images a row has; see load_state
        # The temperature with the smallest loss summed over tasks; the largest among equals.
        self.kappa = best_kappa(KAPPAS, self.losses)
        self._refresh()

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the pooled scatter, to which forgotten rows still count."""
        return float(self.moments.count.sum()) - len(self.moments.count) + self._forgotten

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
        self.shrinks = True
        old = self.task < task
        count, mean = self.moments.count[old], self.moments.mean[old]
        self.task = torch.cat([self.task[old], torch.full((len(new.count),), task)])
        self.moments = ClassMoments(
            torch.cat([count, new.count]), torch.cat([mean, new.mean]), self._before + new.scatter
        )
        self.tasks = task + 1
        self._refresh()

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
        self._forgotten += float((m.count[~stays] - 1).sum())
        self.task = self.task[stays]
        self.moments = ClassMoments(m.count[stays], m.mean[stays], m.scatter)
        if not bool(kept.any()):
            self.losses.pop(task, None)
            self.distances.pop(task, None)
            self.kappa = best_kappa(KAPPAS, self.losses)
        self._refresh()

    def fit(self, task: int, features: Tensor, labels: Tensor) -> None:
        """Stores kappa losses and distances of ``task`` from its images (n, d), against the present rows."""
        own = self.own(task, labels, features)
        scores, row = self.scores(features, own).cpu().double(), own.row.cpu()
        counted = (self._count[own.row] > 1).cpu()
        losses = [
            -(k * scores).log_softmax(1).gather(1, row[:, None])[counted].sum() for k in KAPPAS.tolist()
        ]
        self.losses[task] = torch.stack(losses)
        self.kappa = best_kappa(KAPPAS, self.losses)
        nearest = self._unseen_distance(features, own)[counted].double()
        if len(nearest):
            spread = float(nearest.std(unbiased=False))
            q95 = float(nearest.quantile(0.95))
            self.distances[task] = (q95, max(spread, 1e-3 * q95, 1e-12))
        else:
            # No image to leave out: a Gaussian of d dimensions lies sqrt(d) +- 1/sqrt(2) from its mean.
            self.distances[task] = (self.dim**0.5, 2**-0.5)
        self._tabulate()

    def own(self, task: int, labels: Tensor, f0: Tensor) -> Own:
        """Rows and features for leave-one-out scores of images with ``labels`` (n,) inside ``task``."""
        return Own(labels.to(self.device) + self._first[task], f0.to(self.device))

    def scores(self, f: Tensor, own: Own | None = None) -> Tensor:
        """Row scores ``s`` (n, R) up to a constant per image; ``own`` leaves each image out of its row."""
        z = self.whitened(f)
        return self._scores(z, z @ self._nu.T, own)

    def _scores(self, z: Tensor, products: Tensor, own: Own | None) -> Tensor:
        """As :meth:`scores`, for features in whitened coordinates (n, d) and ``z nu^T`` (n, R)."""
        scores: Tensor = self._shares * products - self._shares.square() * self._half
        if own is None:
            return scores
        share = self.shares(self._count[own.row] - 1)
        nu = share[:, None] * self._left_out(own)
        value = (z * nu).sum(1) - nu.square().sum(1) / 2
        return scores.scatter(1, own.row[:, None], self._unless_alone(own, value, -torch.inf)[:, None])

    def _unless_alone(self, own: Own, value: Tensor, gone: float) -> Tensor:
        """Without its only image a row does not exist; where it is the only row, it stays."""
        alone = (self._count[own.row] <= 1) & (len(self._count) > 1)
        return torch.where(alone, gone, value)

    def shares(self, count: Tensor) -> Tensor:
        """Share of ``nu`` that scores take of rows with so many images each (k,); see ``few_images``."""
        if not self.shrinks:
            return torch.ones_like(count)
        return shares(count, float(self._count.max()), self._between, self._trace)

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
        z = self.whitened(f)
        square = self._squares(z, z @ self._nu.T)
        if own is not None:
            mine = (z - self._left_out(own)).square().sum(1)
            square = square.scatter(1, own.row[:, None], self._unless_alone(own, mine, torch.inf)[:, None])
        return self._nearest(square)

    def _squares(self, z: Tensor, products: Tensor) -> Tensor:
        """Squared distances (n, R) to the means as they are."""
        squares: Tensor = z.square().sum(1, keepdim=True) - 2 * (products - self._half)
        return squares

    @staticmethod
    def _nearest(squares: Tensor) -> tuple[Tensor, Tensor]:
        best, row = squares.min(1)
        return best.clamp(min=0).sqrt(), row

    def readout(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`log_q` (n, R) and :meth:`familiarity` (n,), whose largest part is the same."""
        z = self.whitened(f)
        products = z @ self._nu.T
        log_q = (self.kappa * self._scores(z, products, None)).log_softmax(1)
        return log_q, self._familiarity(*self._nearest(self._squares(z, products)))

    def familiarity(self, f: Tensor) -> Tensor:
        """``sigmoid((q95 - m) / s)`` (n,), q95 and s of the nearest row's task."""
        return self._familiarity(*self.distance(f))

    def _familiarity(self, nearest: Tensor, row: Tensor) -> Tensor:
        q95, spread = self._table[self.row_task[row]].unbind(1)
        return ((q95 - nearest) / spread).sigmoid()

    def _unseen_distance(self, f: Tensor, own: Own) -> Tensor:
        """Smallest distance (n,) of each image to a row, had it been in neither a mean nor the covariance.

        With few images per direction an image pulls the covariance towards itself, and new images of its
        class lie much further out. Without image i the scatter loses ``n/(n-1) v^T v`` (v: its offset
        from its row mean), so by Sherman and Morrison ``d_c^2 = |w_c|^2 + k (w_c v^T)^2 / (1 - k |v|^2)`` in
        whitened coordinates, ``k = n / ((n - 1)(N - R))``; the regularisation is left as it is.
        """
        z, nu = self.whitened(f), self._nu
        n = self._count[own.row].clamp(min=2)
        v = z - nu[own.row]
        u = v.square().sum(1)
        k = n / ((n - 1) * max(self.freedom, 1.0))
        shrink = k / (1 - k * u).clamp(min=1e-6)
        square = z.square().sum(1, keepdim=True) - 2 * z @ nu.T + nu.square().sum(1)
        square = square + shrink[:, None] * ((z * v).sum(1, keepdim=True) - v @ nu.T).square()
        mine = (n / (n - 1)).square() * (u + shrink * u.square())
        nearest: Tensor = square.scatter(1, own.row[:, None], mine[:, None]).min(1).values
        return nearest.clamp(min=0).sqrt().cpu()

    def linear(self, task: int) -> tuple[Tensor, Tensor]:
        """Weight (k, d) and bias (k,) of the linear classifier that the rows of ``task`` make: ``kappa s``.

        Seen from :attr:`reference`, which no later task changes: so far as the covariance stays as it is,
        classifiers of several tasks can be compared.
        """
        centre = self.reference.float().to(self.device)
        mine = (self.task == task).to(self.device)
        nu = self._shares[mine, None] * self._nu[mine] + (self._centre - centre) @ self._map
        weight = self.kappa * nu @ self._map.T
        return weight, -(weight @ centre) - self.kappa * nu.square().sum(1) / 2

    def seen_from(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """What a classifier seen from ``old`` (d,) lacks to be one seen from :attr:`reference`.

        Returns:
            Weight (d,) and bias () of ``kappa (f S^-1 (c - c')^T + (c' S^-1 c'^T - c S^-1 c^T) / 2)``, old c,
            new c', S the covariance: the same for all rows, so that no probability over them changes.
        """
        before, after = (self.whitened(c.to(self.device)) for c in (old, self.reference))
        weight: Tensor = self.kappa * (before - after) @ self._map.T
        bias: Tensor = self.kappa * (after.square().sum() - before.square().sum()) / 2
        return weight, bias - weight @ self._centre

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
        self._refresh()

    def state(self) -> dict[str, Tensor]:
        """Statistics of all rows (fp64), kappa losses and distances of every task."""
        m = self.moments
        tensors = {"task": self.task, "count": m.count, "mean": m.mean, "scatter": m.scatter}
        if self.shrinks:
            tensors["shrinks"] = torch.tensor([True])
        for task, losses in self.losses.items():
            tensors[f"fit.{task}"] = torch.cat(
                [losses, torch.tensor(self.distances[task], dtype=torch.float64)]
            )
        if self._forgotten or self.tasks != self._with_rows:
            tensors["forgotten"] = torch.tensor([self.tasks, self._forgotten], dtype=torch.float64)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave.

        Rows that were saved before there were :meth:`shares` answer as they did, until the next task.
        """
        self.task = tensors["task"].cpu()
        self.shrinks = "shrinks" in tensors
        self.moments = ClassMoments(tensors["count"].cpu(), tensors["mean"].cpu(), tensors["scatter"].cpu())
        for name in sorted((n for n in tensors if n.startswith("fit.")), key=lambda n: int(n.split(".")[1])):
            task, values = int(name.split(".")[1]), tensors[name].cpu()
            self.losses[task] = values[:-2]
            self.distances[task] = (float(values[-2]), float(values[-1]))
        self.tasks = self._with_rows
        if "forgotten" in tensors:
            self.tasks, self._forgotten = int(tensors["forgotten"][0]), float(tensors["forgotten"][1])
        self.kappa = best_kappa(KAPPAS, self.losses)
        self._refresh()

    def simulate(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """Random rows in place of learned ones, for measurements; see :meth:`Method.simulate`.

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
        self.losses = {t: torch.zeros_like(KAPPAS) for t in range(len(classes))}
        self.distances = dict.fromkeys(self.losses, (self.dim**0.5, 2**-0.5))
        self.kappa = best_kappa(KAPPAS, self.losses)
        self._refresh()

    def whitened(self, f: Tensor) -> Tensor:
        """Features (n, d) in the coordinates ``z`` of this module, around the mean of the row means."""
        whitened: Tensor = (f.float() - self._centre) @ self._map
        return whitened

    def _left_out(self, own: Own) -> Tensor:
        n = self._count[own.row].clamp(min=2)[:, None]
        nu: Tensor = (n * self._nu[own.row] - self.whitened(own.f0)) / (n - 1)
        return nu

    def _tabulate(self) -> None:
        """Lays (q95, standard deviation) out by task (T, 2), where scores are computed."""
        unknown = (self.dim**0.5, 2**-0.5)
        table = [self.distances.get(t, unknown) for t in range(self.tasks)]
        self._table = torch.tensor(table, device=self.device).reshape(-1, 2)

    def _refresh(self) -> None:
        """Everything that scores need, on their device: called whenever rows change, never while scoring."""
        m = self.moments
        self._first = [int((self.task < t).sum()) for t in range(self.tasks)]
        self.row_task = self.task.to(self.device)
        self._member = F.one_hot(self.row_task, max(self.tasks, 1)).float()
        self._tabulate()
        self._trace, self._between = 0.0, 0.0
        if not len(self.task):
            nu, inverse = m.mean, torch.zeros(self.dim, 0)  # there is nothing to be far from
            centre = torch.zeros(self.dim, dtype=torch.float64)
        else:
            centre = m.mean.mean(0)
            found, sigma = self._covariance()
            nu, inverse = whitening(sigma, m.mean - centre, self.device)
            # tr(S), S = C^-1 found C^-T, where sigma = C C^T differs from found on the diagonal alone
            added = (sigma - found).diagonal().to(inverse.device)
            self._trace = self.dim - float((added * inverse.square().sum(1)).sum())
            self._between = spread_of_means(nu.cpu(), m.count, self._trace)
        self._nu, self._map = nu.float().to(self.device), inverse.float().to(self.device)
        self._centre, self._count = centre.float().to(self.device), m.count.float().to(self.device)
        self._half = self._nu.square().sum(1) / 2
        self._shares = self.shares(self._count) if len(self._count) else self._count

    def _covariance(self) -> tuple[Tensor, Tensor]:
        """Within-class covariance (d, d), as it was found and shrunk."""
        m = self.moments
        scatter, freedom = m.scatter, self.freedom
        if freedom < 1:  # single images say nothing of the spread in a class: as wide as that between them
            scatter, freedom = torch.diag((m.mean - m.mean.mean(0)).square().sum(0)), max(len(m.mean) - 1, 1)
        return scatter / freedom, shrunk(scatter, freedom)


def best_kappa(grid: Tensor, losses: dict[int, Tensor]) -> float:
    """The temperature of ``grid`` with the smallest loss summed over tasks; the largest among equals."""
    if not losses:
        return float(grid.max())
    total = torch.stack([losses[task] for task in sorted(losses)]).sum(0)
    return float(grid[total <= total.min()].max())


def sum_rows(log_rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums probabilities given as logs (n, R) over the rows of each group (R,) -> (n, groups), as logs.

    Works for tasks and for class names alike; a group without rows gets ``-inf``.
    """
    below, peak = below_peak(log_rows, group, groups)
    total = torch.zeros_like(peak).index_add_(1, group, below.exp())
    return total.log() + peak


def below_peak(log_rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Logs (n, R) less the largest of their group (R,), and these (n, groups); 0 for one that is empty.

    The peak is taken per group: one far below the best must not underflow, because the shares inside it are
    still asked for.
    """
    peak = log_rows.new_full((log_rows.shape[0], groups), -torch.inf)
    peak = peak.scatter_reduce(1, group.expand_as(log_rows), log_rows, "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    return log_rows - peak[:, group], peak
