"""Dynamic memory: how much each task's residual adapter concerns an image, read above frozen layers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duallora.adapters.moments import TokenReader
from duallora.adapters.per_pass import PerPass
from duallora.adapters.subspace import Subspace
from duallora.classifiers.calibration import best_kappa
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.gaussian import Own
from duallora.storage.learned import ByTask, Learned

ENERGY_KAPPAS = torch.logspace(-0.3010299956639812, 1.6989700043360187, 20, dtype=torch.float64)  # .5 to 50


class EnergyMemory(Learned):
    """Relevance by energy in the tasks' bases (paper-like).

    ``e_j = |f N_j|^2 / |f|^2`` over its mean on the task's own images.

    Args:
        subspace: the subspace of the first adapted projection, whose blocks are the ``N_j``.
        device: where energies are computed.
    """

    def __init__(self, subspace: Subspace, device: torch.device) -> None:
        super().__init__(device)
        self._of = (subspace,)  # as an attribute of its own it would be saved here too
        self.means: Tensor  # mean energy of each task's own images; infinite where it is forgotten
        self.register_buffer("means", torch.zeros(0, dtype=torch.float64))
        self.fit = ByTask()  # loss of every kappa
        self._blocks: list[Tensor] = []
        self._update()

    @property
    def subspace(self) -> Subspace:
        """Where the tasks' bases are."""
        return self._of[0]

    @property
    def losses(self) -> dict[int, Tensor]:
        """Loss of every kappa on each task's images."""
        return dict(self.fit.items())

    def replace(self, task: int, block: Tensor, f0: Tensor) -> None:
        """Sets the basis of ``task`` (d x m) and its mean energy on the task's own features f0 (n, d)."""
        self._blocks = [*self._blocks[:task], block.float().to(self.device)]
        mean = max(float(self._shares(f0)[:, task].mean()), 1e-12)
        self.means = torch.cat([self.means[:task], torch.tensor([mean], dtype=torch.float64)])
        self._update()

    def fit_temperature(self, task: int, f0: Tensor) -> None:
        """Stores the loss of every kappa on the task's images (n, d) against the bases that exist now."""
        log_energy = self._log_energy(f0).cpu().double()
        if not bool(torch.isfinite(log_energy[:, task]).all()):
            self.fit.discard(task)  # an empty basis has no posterior, whatever the pass before found
        else:
            self.fit[task] = torch.stack(
                [-(k * log_energy).log_softmax(1)[:, task].sum() for k in ENERGY_KAPPAS.tolist()]
            )
        self._update()

    def forget(self, task: int) -> None:
        """Loses losses and mean of ``task``: against an infinite mean no image has energy in its basis.

        The basis itself is a part of ``Phi``, which stays; here it counts as empty.
        """
        self.fit.discard(task)
        self.means = self.means.clone()
        self.means[task] = float("inf")
        self._blocks[task] = self._blocks[task][:, :0]
        self._update()

    def energies(self, f: Tensor) -> Tensor:
        """Relative energies ``e`` (n, T); 0 for a task without a basis."""
        return self._shares(f) / self._means

    def log_posterior(self, f: Tensor) -> Tensor:
        """``log_softmax(kappa log e)`` over tasks (n, T); a task without a basis gets ``-inf``."""
        log_energy = self._log_energy(f)
        if not any(block.shape[1] for block in self._blocks):
            return torch.zeros_like(log_energy).log_softmax(1)
        return (self.kappa * log_energy).log_softmax(1)

    def refresh(self) -> None:
        """Takes the blocks of the subspace, which is loaded before."""
        means = self.means.tolist()
        blocks = [self.subspace.block(task).float().to(self.device) for task in range(len(means))]
        self._blocks = [b if m < float("inf") else b[:, :0] for b, m in zip(blocks, means, strict=True)]
        self._update()

    def _update(self) -> None:
        # Temperature of the posterior: smallest loss summed over tasks, the largest among equals.
        self.kappa = best_kappa(ENERGY_KAPPAS, self.losses)
        self._means = self.means.float().to(self.device)
        empty = [block.shape[1] == 0 for block in self._blocks]
        self._empty = torch.tensor(empty, dtype=torch.bool, device=self.device)

    def _shares(self, f: Tensor) -> Tensor:
        f = f[:, : len(self.subspace.phi)].float()  # the class token's part: only that lies in these bases
        norm = f.square().sum(1).clamp(min=1e-20)
        return torch.stack([(f @ block).square().sum(1) / norm for block in self._blocks], 1)

    def _log_energy(self, f: Tensor) -> Tensor:
        return self.energies(f).clamp(min=1e-20).log().masked_fill(self._empty, -torch.inf)


class GatePoint(nn.Module):
    """One place where the gate reads a feature and says how much every task concerns the image.

    Args:
        dim: width of the feature.
        device: where weights are computed.
        top_tasks: most tasks with a non-zero weight per image.
        energy: relevance by energy; None takes the Gaussian rows.
    """

    def __init__(self, dim: int, device: torch.device, top_tasks: int, energy: EnergyMemory | None) -> None:
        super().__init__()
        self.rows = ClassStatistics(dim, device)
        self.top_tasks = top_tasks
        self.energy: EnergyMemory | None
        self.register_module("energy", energy)
        self.f0 = torch.zeros(0, dim)  # features of the current task's images in the latest pass

    def learn(self, task: int, f0: Tensor, labels: Tensor, classes: int, block: Tensor | None) -> None:
        """Takes the features f0 (n, d) of the task's images, in place of those of an earlier pass."""
        self.f0 = f0.to(self.rows.device)
        self.rows.replace(task, ClassMoments.of(f0, labels, classes))
        self.rows.fit_temperature(task, f0, labels)
        if self.energy is not None and block is not None:
            self.energy.replace(task, block, self.f0)
            self.energy.fit_temperature(task, self.f0)

    def forget(self, task: int, kept: Tensor) -> None:
        """Loses rows of ``task``, and its energy with the last of them; ``kept`` (|Y_t|,) says which stay."""
        self.rows.forget(task, kept)
        if self.energy is not None and not bool(kept.any()):
            self.energy.forget(task)

    def weights(self, f: Tensor, own: Own | None = None, uses: Sequence[int] = ()) -> Tensor:
        """Weights ``w`` (n, T) in [0, 1] for features (n, d), fp32, without gradient; 1 for a single task.

        Args:
            f: features at this point.
            own: for images of the current task: leave them out of their own row.
            uses: the task whose adapter each task uses (T,): it gets the weights of all that use it.
        """
        with torch.no_grad(), torch.autocast(f.device.type, enabled=False):
            f, tasks = f.float(), self.rows.tasks
            if tasks == 1:
                return torch.ones(f.shape[0], 1, device=f.device)
            # Also a sum of probabilities may be above 1, by rounding.
            found = self.rows.task_weights(f, own) if self.energy is None else self.energy.energies(f)
            owners = [*uses[:tasks]]  # of a task that has no row yet an owner may be noted
            if any(task != owner for task, owner in enumerate(owners)):
                found = torch.zeros_like(found).index_add_(1, torch.tensor(owners, device=f.device), found)
            weights = found.clamp(max=1.0)
            if tasks > self.top_tasks:
                value, which = weights.topk(self.top_tasks, 1)
                weights = torch.zeros_like(weights).scatter(1, which, value)
            return weights

    def simulate(self, classes: Sequence[int], generator: torch.Generator) -> None:
        """Random rows and even energies of tasks with so many classes; the subspace is there already."""
        self.rows.simulate(classes, generator)
        if self.energy is not None:
            even = {f"fit.{t}": torch.zeros_like(ENERGY_KAPPAS) for t in range(len(classes))}
            self.energy.load_state_dict({"means": torch.ones(len(classes), dtype=torch.float64)} | even)


class Domains(Learned):
    """Which tasks share a residual adapter.

    Attributes:
        uses: the task whose residual adapter each task uses: the first of its domain.
    """

    optional = frozenset({"shared"})

    def __init__(self) -> None:
        super().__init__()
        self.shared: Tensor | None  # uses; not there while no task shares
        self.register_buffer("shared", None)
        self.uses: list[int] = []

    def note(self, uses: list[int]) -> None:
        """Sets the list for all tasks."""
        self.uses = uses
        self.shared = torch.tensor(uses) if uses != list(range(len(uses))) else None

    def restored(self, tasks: int) -> None:
        """After a load: a model of so many tasks that says nothing shares nothing."""
        self.uses = list(range(tasks)) if self.shared is None else self.shared.tolist()


@dataclass
class GatePass:
    """What the gate reads and says in one pass of the backbone over B images.

    Attributes:
        own: labels and indices of the images (B,) if they are the current task's: each is left out of its
            own row then.
        features: what was read (B, m d), by layer of the gate points.
        weights: of the tasks (B, T), by adapted layer; empty before the first task.
    """

    own: tuple[Tensor, Tensor] | None = None
    features: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)

    @property
    def mean_weights(self) -> Tensor | None:
        """Weights (B, T), averaged over adapted layers; None before the first task."""
        return torch.stack(list(self.weights.values())).mean(0) if self.weights else None


class DynamicMemory:
    """The gate of all adapted layers: which points are read, and what a layer gets.

    Args:
        mode: ``"first"`` (one point, at the first adapted layer, above frozen layers only), ``"layer"`` or
            ``"off"`` (all weights 1).
        points: the gate points by layer, in order.
        reader: how to read an image's feature from its tokens.
    """

    def __init__(self, mode: str, points: dict[int, GatePoint], reader: TokenReader) -> None:
        self.mode, self.points, self.reader = mode, points, reader
        self.tasks = 0
        self.domains = Domains()
        self.current: PerPass[GatePass] = PerPass()

    @contextmanager
    def reading(self, own: tuple[Tensor, Tensor] | None = None) -> Iterator[GatePass]:
        """Inside, one pass of the backbone in this thread is gated; outside, no residual adapter acts.

        Args:
            own: labels and indices of the images, if they are the current task's.

        Yields:
            What the gate has read and said, complete after the pass.
        """
        with self.current.holding(GatePass(own)) as seen:
            yield seen

    def gate(self, layer: int, x: Tensor) -> Tensor | None:
        """Weights (B, T) for the input (B, N, d) of an adapted layer.

        None before the first task and outside :meth:`reading`.
        """
        seen = self.current.get()
        if seen is None:
            return None
        point = self.points.get(layer)
        if point is not None:
            seen.features[layer] = self.reader.description(x.detach(), layer)
        if self.tasks == 0:
            return None
        if self.mode == "off":
            seen.weights[layer] = torch.ones(x.shape[0], self.tasks, device=x.device)
        elif point is not None:
            own = self._own(point, seen)
            seen.weights[layer] = point.weights(seen.features[layer], own, self.domains.uses)
        else:
            seen.weights[layer] = seen.weights[next(iter(self.points))]
        return seen.weights[layer]

    def join(self, task: int, f0: dict[int, Tensor], threshold: float, adapted: Container[int]) -> None:
        """Notes whose residual adapter the coming task uses: its own, if its images are unfamiliar.

        New classes of a known domain lie near the rows of the old ones below the adapters; another domain
        lies nowhere near them. So a domain has one adapter, which the gate finds however alike its classes.

        Args:
            task: index of the task, whose rows are not there yet.
            f0: features of its images at every gate point (n, d).
            threshold: mean familiarity from which on a domain is known; above 1 none ever is.
            adapted: tasks that have a residual adapter of their own.
        """
        uses = [*self.domains.uses[:task], task]
        if threshold <= 1:
            layer, point = next(iter(self.points.items()))
            f, rows = f0[layer].to(point.rows.device).float(), point.rows
            if len(rows.task) and float(rows.familiarity(f).mean()) >= threshold:
                shares = rows.task_weights(f).mean(0).cpu()
                by_owner = torch.zeros_like(shares).index_add_(0, torch.tensor(uses[: len(shares)]), shares)
                nearest = int(by_owner.argmax())
                # A domain that two tasks share is one, though its adapters may have been taken away.
                uses[task] = nearest if nearest in adapted or nearest in uses[nearest + 1 : task] else task
        self.domains.note(uses)

    def release(self) -> None:
        """Forgets the features of single images, once the task they belong to has ended."""
        for point in self.points.values():
            point.f0 = point.f0[:0]

    def _own(self, point: GatePoint, seen: GatePass) -> Own | None:
        if seen.own is None:
            return None
        labels, indices = seen.own
        return point.rows.own(self.tasks - 1, labels, point.f0[indices.to(point.f0.device)])
