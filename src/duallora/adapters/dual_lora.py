"""The two adapters beside one fused qkv projection: orthogonal (merged), residual (gated per image).

Row vectors: ``y = x (W_0 + sum_j A_j B_j) + (x A_t) B_t + sum_j w_j(image) (x Psi_j) C_j``. ``nn.Linear``
stores transposes, so ``A B`` is added to its weight as ``(A B)^T``. A *group* is the set of projections that
share one second moment and therefore one A, one Psi and one Phi: ``"kv"`` with all-token moments, ``"q"`` and
``"v"`` apart with class-token moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Beyond this many stacked residual directions the selected ones are gathered per image instead.
STACKED_LIMIT = 100

# Layer input (B, N, d) -> weights of the tasks (B, T), None before the first task.
Gate = Callable[[Tensor], Tensor | None]


@dataclass
class Residual:
    """Residual adapter of one task: fixed basis ``Psi_j`` (d x r_R) and its ``C_j`` (r_R x out)."""

    task: int
    psi: Tensor
    c: Tensor


class DualAdapter(nn.Module):
    """Orthogonal and residual adapters of one group of projections.

    Args:
        dim: d, width of the layer's input.
        out: columns written, ``d`` per projection of the group.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.dim, self.out = dim, out
        self.a: nn.Parameter | None = None  # A_t (d x r): fixed unless the update is projected
        self.b: nn.Parameter | None = None  # B_t (r x out)
        self.factors: list[tuple[Tensor, Tensor]] = []  # merged A_j, B_j
        self.owners: list[int] = []  # the task of each; -1 where a model saved earlier does not say
        self.dense: Tensor | None = None  # their sum (d x out, fp32), once the factors would be larger
        self.psi: Tensor | None = None  # Psi_t
        self.c: nn.Parameter | None = None  # C_t
        self.current = -1
        self.residuals: list[Residual] = []
        self._stack: _Stack | None = None  # of the finished tasks
        self._open: _Stack | None = None  # the same with Psi_t beside, while a task is trained

    def begin(self, task: int, a: Tensor, psi: Tensor, train_a: bool = False) -> None:
        """Opens a task with A_t = ``a`` (d x r) and Psi_t = ``psi`` (d x r_R); empty ones are left out.

        B_t and C_t start at zero.
        """
        self.current = task
        if a.shape[1]:
            self.a = nn.Parameter(a, requires_grad=train_a)
            self.b = nn.Parameter(a.new_zeros(a.shape[1], self.out))
        if psi.shape[1]:
            self.psi = psi
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
            self.factors.append((self.a.detach().clone(), self.b.detach().clone()))
            self.owners.append(self.current)
            if self.dense is not None or 2 * sum(a.shape[1] for a, _ in self.factors) >= self.dim:
                self.dense, self.factors, self.owners = self.delta_weight(), [], []
        if self.psi is not None and self.c is not None:
            self.residuals.append(Residual(self.current, self.psi, self.c.detach().clone()))
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

    def forget(self, task: int, residual: int | None) -> None:
        """Loses the factors of ``task`` where they are not summed up yet, and the adapter ``residual``."""
        kept = [i for i, owner in enumerate(self.owners) if owner != task]
        self.factors, self.owners = [self.factors[i] for i in kept], [self.owners[i] for i in kept]
        self.residuals = [part for part in self.residuals if part.task != residual]
        self.restack()

    def orthogonal(self, x: Tensor) -> Factors | None:
        """The update in training, ``(x A_t) B_t`` (B, N, out), its last product not yet made."""
        return None if self.a is None or self.b is None else (x @ self.a, self.b)

    def residual(self, x: Tensor, weights: Tensor, selected: int) -> Factors | None:
        """``sum_j w_j (x Psi_j) C_j`` (B, N, out) for ``weights`` (B, T), its last product not yet made.

        Args:
            x: (B, N, d).
            weights: per image and task; at most ``selected`` of a row are non-zero.
            selected: number of tasks gathered per image where stacking all of them would cost more.
        """
        stack, c = self._stack, None if self._stack is None else self._stack.c
        if self._open is not None and self.c is not None:
            # Only C_t moves in training; bases and whose they are were laid out once.
            stack, c = self._open, self.c if c is None else torch.cat([c, self.c])
        if stack is None or c is None:
            return None
        if stack.psi.shape[1] > STACKED_LIMIT and len(stack.ranks) > selected:
            return _gathered(x, weights[:, stack.tasks], stack, c, selected)
        scale = weights[:, stack.owner]  # (B, K)
        return (x @ stack.psi) * scale.unsqueeze(1), c

    def restack(self) -> None:
        """Lays the frozen residual adapters side by side once, so that inference concatenates nothing."""
        self._stack = _stack(self.residuals) if self.residuals else None

    def state(self) -> dict[str, Tensor]:
        """What the finished tasks left here: factors or their sum, residual bases and their ``C_j``."""
        tensors = {} if self.dense is None else {"dense": self.dense}
        for i, (a, b) in enumerate(self.factors):
            tensors |= {f"orthogonal.{i}.a": a, f"orthogonal.{i}.b": b}
        if self.owners:
            tensors["orthogonal.tasks"] = torch.tensor(self.owners)
        for part in self.residuals:
            tensors |= {f"residual.{part.task}.psi": part.psi, f"residual.{part.task}.c": part.c}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave; tensors are already on the right device."""
        self.dense = tensors.get("dense")
        count = sum(name.startswith("orthogonal.") and name.endswith(".a") for name in tensors)
        self.factors = [(tensors[f"orthogonal.{i}.a"], tensors[f"orthogonal.{i}.b"]) for i in range(count)]
        owners = tensors.get("orthogonal.tasks")
        self.owners = [-1] * count if owners is None else owners.tolist()
        tasks = sorted(
            int(name.split(".")[1])
            for name in tensors
            if name.startswith("residual.") and name.endswith(".c")
        )
        self.residuals = [
            Residual(t, tensors[f"residual.{t}.psi"], tensors[f"residual.{t}.c"]) for t in tasks
        ]
        self.restack()


Factors = tuple[Tensor, Tensor]
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


def _gathered(x: Tensor, weights: Tensor, stack: _Stack, c: Tensor, selected: int) -> Factors:
    """The same sum over each image's ``selected`` tasks alone: its cost grows with what is used."""
    psi = _bases(stack.psi, stack.ranks) if stack.bases is None else stack.bases
    c = _by_task(c, stack.ranks)
    top, which = weights.topk(selected, 1)  # (B, s)
    batch, dim, out = x.shape[0], x.shape[2], c.shape[2]
    psi = psi[which].permute(0, 2, 1, 3).reshape(batch, dim, -1)  # B x d x (s r_R)
    c = (c[which] * top[:, :, None, None]).reshape(batch, -1, out)  # smaller than what it is multiplied with
    return torch.bmm(x, psi), c


class AdaptedQKV(nn.Module):
    """A fused qkv ``nn.Linear`` with the adapters beside it; the wrapped weight itself is never changed.

    Args:
        base: the frozen projection, ``d -> 3 d_out`` in the order q, k, v.
        groups: names of the groups, each a string over ``q``, ``k``, ``v``.
        selected: most residual adapters that act on one image (``top_tasks``).
    """

    def __init__(self, base: nn.Linear, groups: Sequence[str], selected: int = 4) -> None:
        super().__init__()
        self.base = base
        self.dim = base.in_features
        self.width = base.out_features // 3
        self.selected = selected
        self.groups: dict[str, DualAdapter] = {}
        for name in groups:
            self.groups[name] = DualAdapter(self.dim, len(name) * self.width)
            self.add_module(f"group_{name}", self.groups[name])
        self._written = {name: adjacent(self.slices(name)) for name in groups}
        self.gate: Gate | None = None
        self.effective: Tensor | None = None  # cast(W_0 + dW), cast once after each merge

    @property
    def weight(self) -> Tensor:
        """Effective weight of the linear part (3 d_out x d), as ``nn.Linear`` stores it."""
        return self.base.weight if self.effective is None else self.effective

    @property
    def bias(self) -> Tensor | None:
        """Bias of the wrapped projection."""
        return self.base.bias

    def slices(self, group: str) -> list[slice]:
        """Output columns of each projection in a group."""
        return [slice("qkv".index(p) * self.width, ("qkv".index(p) + 1) * self.width) for p in group]

    def frozen_weight(self, group: str) -> Tensor:
        """``W_0`` of a group's projections (d x out)."""
        return torch.cat([self.base.weight.detach()[s] for s in self.slices(group)], 0).T

    def refresh(self) -> None:
        """Recomputes the effective weight from ``W_0`` and ``dW``; call after a merge, a load or a move."""
        updates = {name: adapter.delta_weight() for name, adapter in self.groups.items()}
        if all(update is None for update in updates.values()):
            self.effective = None
            return
        weight = self.base.weight.detach().float().clone()
        for name, update in updates.items():
            if update is not None:
                for part, columns in zip(update.split(self.width, 1), self.slices(name), strict=True):
                    weight[columns] += part.T
        self.effective = weight.to(self.base.weight.dtype)

    def merge(self) -> None:
        """Ends the task in every group and refreshes the effective weight."""
        for adapter in self.groups.values():
            adapter.merge()
        self.refresh()

    def forget(self, task: int, residual: int | None) -> None:
        """Loses what ``task`` added, so far as it is still apart, and refreshes the effective weight.

        Args:
            task: whose orthogonal factors go.
            residual: whose residual adapter goes; None where another task still uses it.
        """
        for adapter in self.groups.values():
            adapter.forget(task, residual)
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d_out)."""
        weights = None if self.gate is None else self.gate(x)
        y = F.linear(x, self.weight, self.base.bias)
        for name, adapter in self.groups.items():
            found = [adapter.orthogonal(x)]
            if weights is not None:
                found.append(adapter.residual(x, weights, self.selected))
            for factors in found:
                if factors is not None:
                    _add_product(y, *factors, self._written[name])
        return y


def _add_product(y: Tensor, h: Tensor, c: Tensor, pieces: Sequence[slice]) -> None:
    """Adds ``h c`` (B, N, out) to the columns of ``y`` (B, N, 3 d_out) that the pieces name, in order.

    The product goes where it belongs, without a tensor of its own; in place as :func:`add_columns`.

    Args:
        y: what is added to, contiguous.
        h: (B, N, K).
        c: (K, out), or for each image (B, K, out).
        pieces: columns of y.
    """
    h, start = h.to(y.dtype), 0
    for columns in pieces:
        width = columns.stop - columns.start
        part = c[..., start : start + width].to(y.dtype)  # autocast leaves products in place alone
        if c.dim() == 2:
            y.view(-1, y.shape[2])[:, columns].addmm_(h.reshape(-1, h.shape[2]), part)
        else:
            y[..., columns].baddbmm_(h, part)
        start += width


def adjacent(slices: Sequence[slice]) -> list[slice]:
    """The same columns in as few pieces as their order allows: k and v are one piece."""
    joined: list[slice] = []
    for each in slices:
        if joined and joined[-1].stop == each.start:
            joined[-1] = slice(joined[-1].start, each.stop)
        else:
            joined.append(each)
    return joined


def add_columns(y: Tensor, update: Tensor, pieces: Sequence[slice]) -> None:
    """Adds an update (B, N, out) to the columns of ``y`` (B, N, 3 d_out) that the pieces name, in order.

    In place: y is fresh from a product and no gradient needs its old value.
    """
    start = 0
    for columns in pieces:
        width = columns.stop - columns.start
        y[..., columns].add_(update[..., start : start + width])
        start += width
