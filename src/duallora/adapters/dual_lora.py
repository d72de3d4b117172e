"""The two adapters beside one fused qkv projection: orthogonal (merged), residual (gated per image).

Row vectors: ``y = x (W_0 + sum_j A_j B_j) + (x A_t) B_t + sum_j w_j(image) (x Psi_j) C_j``. ``nn.Linear``
stores transposes, so ``A B`` is added to its weight as ``(A B)^T``. A *group* is the set of projections that
share one second moment and therefore one A, one Psi and one Phi: ``"kv"`` with all-token moments, ``"q"`` and
``"v"`` apart with class-token moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.wrapped_qkv import WrappedQKV
from duallora.storage.learned import CPU, Groups, Learned

# Beyond this many stacked residual directions the selected ones are gathered per image instead.
STACKED_LIMIT = 100

# Layer input (B, N, d) -> weights of the tasks (B, T), None before the first task.
Gate = Callable[[Tensor], Tensor | None]


@dataclass
class Residual:
    """Residual adapter of one task: its basis ``Psi_j`` (d x r_R) and its ``C_j`` (r_R x out)."""

    task: int
    psi: Tensor
    c: Tensor


class Factors(Groups):
    """Merged ``A_j`` (d x r) and ``B_j`` (r x out), one pair a task, so long as they are apart.

    Args:
        device: of loaded ones.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"tasks"})

    def __init__(self, device: torch.device) -> None:
        super().__init__("a", "b", device=device)
        self.tasks: Tensor | None  # the task of each pair; -1 where a model saved earlier does not say
        self.register_buffer("tasks", None)

    def replace(self, pairs: Sequence[tuple[Tensor, Tensor]], tasks: Sequence[int]) -> None:
        """These pairs instead of those before."""
        self.clear()
        for i, (a, b) in enumerate(pairs):
            self.put(i, a, b)
        self.tasks = torch.tensor(tasks) if len(tasks) else None


class DualAdapter(Learned):
    """Orthogonal and residual adapters of one group of projections.

    Args:
        dim: d, width of the layer's input.
        out: columns written, ``d`` per projection of the group.
        device: of what is loaded.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"dense"})

    def __init__(self, dim: int, out: int, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.dim, self.out = dim, out
        self.a: nn.Parameter | None = None  # A_t (d x r): fixed
        self.b: nn.Parameter | None = None  # B_t (r x out)
        self.orthogonal = Factors(device)
        self.dense: Tensor | None  # their sum (d x out, fp32), once the factors would be larger
        self.register_buffer("dense", None)
        self.residual = Groups("psi", "c", device=device)  # of the finished tasks, by task
        self.psi: nn.Parameter | None = None  # Psi_t: fixed, or trained from where it starts
        self.c: nn.Parameter | None = None  # C_t
        self.current = -1
        self._stack: _Stack | None = None  # of the finished tasks
        self._open: _Stack | None = None  # the same with Psi_t beside, while a task is trained

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Merged ``A_j`` and ``B_j`` that are not summed up yet."""
        return [(a, b) for _, (a, b) in self.orthogonal.groups()]

    @property
    def owners(self) -> list[int]:
        """The task of each of the factors; -1 where a model saved earlier does not say."""
        tasks = self.orthogonal.tasks
        return [-1] * len(self.orthogonal.groups()) if tasks is None else tasks.tolist()

    @property
    def residuals(self) -> list[Residual]:
        """Residual adapters of the finished tasks."""
        return [Residual(task, psi, c) for task, (psi, c) in self.residual.groups()]

    def begin(self, task: int, a: Tensor, psi: Tensor, moves: bool = False) -> None:
        """Opens a task with A_t = ``a`` (d x r) and Psi_t = ``psi`` (d x r_R); empty ones are left out.

        B_t and C_t start at zero.

        Args:
            task: its index.
            a: fixed.
            psi: fixed, or with ``moves`` where the training of Psi_t starts.
            moves: whether Psi_t is trained beside C_t.
        """
        self.current = task
        if a.shape[1]:
            self.a = nn.Parameter(a, requires_grad=False)
            self.b = nn.Parameter(a.new_zeros(a.shape[1], self.out))
        if psi.shape[1]:
            self.psi = nn.Parameter(psi, requires_grad=moves)
            self.c = nn.Parameter(psi.new_zeros(psi.shape[1], self.out))
            self._open = _stack([*self.residuals, Residual(task, psi, self.c.detach())])

    def delta_weight(self) -> Tensor | None:
        """Accumulated update ``dW = sum_j A_j B_j`` (d x out, fp32), or None before the first merge."""
        total = self.dense
        for a, b in self.factors:
            total = a @ b if total is None else total + a @ b
        return total

    def merge(self) -> None:
        """Ends the task: ``A_t B_t`` joins ``dW``, ``C_t`` is frozen beside the earlier ones."""
        if self.a is not None and self.b is not None:
            new = (self.a.detach().clone(), self.b.detach().clone())
            self.orthogonal.replace([*self.factors, new], [*self.owners, self.current])
            if self.dense is not None or 2 * sum(a.shape[1] for a, _ in self.factors) >= self.dim:
                self.dense = self.delta_weight()
                self.orthogonal.replace([], [])
        if self.psi is not None and self.c is not None:
            self.residual.put(self.current, self.psi.detach().clone(), self.c.detach().clone())
        self.a = self.b = self.psi = self.c = self._open = None
        self.restack()

    @torch.no_grad()
    def simulate(self, task: int, a: Tensor, psi: Tensor, generator: torch.Generator) -> None:
        """A finished task with random ``B`` and ``C`` on these bases, for measurements."""
        self.begin(task, a, psi)
        for trained in (self.b, self.c):
            if trained is not None:
                trained.copy_(0.02 * torch.randn(trained.shape, generator=generator))
        self.merge()

    def forget(self, task: int, residual: int | None = None) -> None:
        """Loses the factors of ``task`` where they are not summed up yet, and the adapter ``residual``."""
        factors, owners = self.factors, self.owners
        kept = [i for i, owner in enumerate(owners) if owner != task]
        self.orthogonal.replace([factors[i] for i in kept], [owners[i] for i in kept])
        if residual is not None:
            self.residual.discard(residual)
        self.restack()

    def orthogonal_product(self, x: Tensor) -> Product | None:
        """The update in training, ``(x A_t) B_t`` (B, N, out), its last product not yet made."""
        return None if self.a is None or self.b is None else (x @ self.a, self.b)

    def residual_product(self, x: Tensor, weights: Tensor, selected: int) -> Product | None:
        """``sum_j w_j (x Psi_j) C_j`` (B, N, out) for ``weights`` (B, T), its last product not yet made.

        Args:
            x: (B, N, d).
            weights: per image and task; at most ``selected`` of a row are non-zero.
            selected: number of tasks gathered per image where stacking all of them would cost more.
        """
        stack, c = self._stack, None if self._stack is None else self._stack.c
        if self._open is not None and self.psi is not None and self.c is not None:
            # What is trained lies last; fixed bases, and whose they are, were laid out once.
            stack, c = self._open, self.c if c is None else torch.cat([c, self.c])
            if self.psi.requires_grad:
                fixed = stack.psi[:, : -self.psi.shape[1]]
                stack = replace(stack, psi=torch.cat([fixed, self.psi], 1), bases=None)
        if stack is None or c is None:
            return None
        if stack.psi.shape[1] > STACKED_LIMIT and len(stack.ranks) > selected:
            return _gathered(x, weights[:, stack.tasks], stack, c, selected)
        scale = weights[:, stack.owner]  # (B, K)
        return (x @ stack.psi) * scale.unsqueeze(1), c

    def restack(self) -> None:
        """Lays the frozen residual adapters side by side once, so that inference concatenates nothing."""
        parts = self.residuals
        self._stack = _stack(parts) if parts else None

    def refresh(self) -> None:
        """Lays out what was loaded."""
        self.orthogonal.replace(self.factors, self.owners)
        self.restack()


def saved_ranks(tensors: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """Ranks of a saved :class:`DualAdapter`: of the merged update, and of each residual adapter by task."""
    dense = tensors.get("dense")
    if dense is None:
        merged = [x.shape[1] for name, x in tensors.items() if name.endswith(".a")]
        rank = sum(merged)
    else:
        rank = int(torch.linalg.matrix_rank(dense.double()))
    residual = {int(name.split(".")[1]): x.shape[1] for name, x in tensors.items() if name.endswith(".psi")}
    return rank, [residual[task] for task in sorted(residual)]


def part_of_place(name: str) -> str:
    """The part of the model that a saved tensor of a place belongs to, by its name there."""
    part = name.split(".")[0]
    return "residual" if part == "residual" else "orthogonal" if part in ("orthogonal", "dense") else "bases"


Product = tuple[Tensor, Tensor]
"""An update as a product that is not made yet: (B, N, K) and (K, out) or, for each image, (B, K, out)."""


@dataclass
class _Stack:
    psi: Tensor  # d x K
    c: Tensor  # K x out
    owner: Tensor  # K: the task of each direction
    tasks: Tensor  # the tasks that have a basis here
    ranks: list[int]
    bases: Tensor | None  # T x d x r_R: the same as psi by task, where it is gathered from


def _stack(parts: Sequence[Residual]) -> _Stack:
    device = parts[0].psi.device
    tasks = torch.tensor([part.task for part in parts], device=device)
    ranks = [part.psi.shape[1] for part in parts]
    owner = tasks.repeat_interleave(torch.tensor(ranks, device=device))
    psi, c = torch.cat([p.psi for p in parts], 1), torch.cat([p.c for p in parts], 0)
    bases = _bases(psi, ranks) if psi.shape[1] > STACKED_LIMIT else None
    return _Stack(psi, c, owner, tasks, ranks, bases)


def _bases(psi: Tensor, ranks: list[int]) -> Tensor:
    """Bases side by side (d x K) -> by task (T x d x r_R)."""
    rank = max(ranks)  # a smaller basis is padded with zeros, which contribute nothing
    return torch.stack([F.pad(p, (0, rank - p.shape[1])) for p in psi.split(ranks, 1)])


def _by_task(c: Tensor, ranks: list[int]) -> Tensor:
    """What writes (K x out) -> by task (T x r_R x out)."""
    rank = max(ranks)
    if rank == min(ranks):
        return c.view(len(ranks), rank, -1)
    return torch.stack([F.pad(p, (0, 0, 0, rank - p.shape[0])) for p in c.split(ranks, 0)])


def _gathered(x: Tensor, weights: Tensor, stack: _Stack, c: Tensor, selected: int) -> Product:
    """The same sum over each image's ``selected`` tasks alone: its cost grows with what is used."""
    psi = _bases(stack.psi, stack.ranks) if stack.bases is None else stack.bases
    c = _by_task(c, stack.ranks)
    top, which = weights.topk(selected, 1)  # (B, s)
    batch, dim, out = x.shape[0], x.shape[2], c.shape[2]
    psi = psi[which].permute(0, 2, 1, 3).reshape(batch, dim, -1)  # B x d x (s r_R)
    c = (c[which] * top[:, :, None, None]).reshape(batch, -1, out)  # smaller than what it is multiplied with
    return torch.bmm(x, psi), c


class AdaptedQKV(WrappedQKV):
    """A fused qkv ``nn.Linear`` with the adapters beside it.

    Args:
        base: the frozen projection, ``d -> 3 d_out`` in the order q, k, v.
        groups: names of the groups, each a string over ``q``, ``k``, ``v``.
        selected: most residual adapters that act on one image (``top_tasks``).
    """

    def __init__(self, base: nn.Linear, groups: Sequence[str], selected: int = 4) -> None:
        super().__init__(base, groups)
        self.selected = selected
        self.groups: dict[str, DualAdapter] = {}
        for name in groups:
            self.groups[name] = DualAdapter(self.dim, len(name) * self.width, base.weight.device)
            self.add_module(f"group_{name}", self.groups[name])
        self.gate: Gate | None = None

    def refresh(self) -> None:
        """Recomputes the effective weight from ``W_0`` and ``dW``; call after a merge or a load."""
        self.merge_updates({name: adapter.delta_weight() for name, adapter in self.groups.items()})

    def merge(self) -> None:
        """Ends the task in every group and refreshes the effective weight."""
        for adapter in self.groups.values():
            adapter.merge()
        self.refresh()

    def forget(self, task: int, residual: int | None = None) -> None:
        """Loses what ``task`` added, so far as it is still apart, and refreshes the effective weight.

        Args:
            task: whose orthogonal factors go.
            residual: whose residual adapter goes; None where another task still uses it.
        """
        for adapter in self.groups.values():
            adapter.forget(task, residual)
        self.refresh()

    @contextmanager
    def without(self, task: int) -> Iterator[None]:
        """Inside, what ``task`` added is not there, so far as it is still apart."""
        saved = {name: dict(adapter.state_dict()) for name, adapter in self.groups.items()}
        self.forget(task, task)
        try:
            yield
        finally:
            for name, adapter in self.groups.items():
                adapter.load_state_dict(saved[name])
            self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d_out)."""
        weights = None if self.gate is None else self.gate(x)
        y = self.linear(x)
        for name, adapter in self.groups.items():
            products = [adapter.orthogonal_product(x)]
            if weights is not None:
                products.append(adapter.residual_product(x, weights, self.selected))
            for product in products:
                if product is not None:
                    self.add_product(y, name, *product)
        return y
