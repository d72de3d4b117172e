"""Orthonormal bases of feature subspaces: what earlier tasks use, and where a new task may write.

Row vectors throughout: a token is a row ``x`` (1 x d), a second moment is ``S = mean(x^T x)`` (d x d), a
basis is d x m with orthonormal columns. Eigendecompositions run in fp64 on the CPU, so that the same moments
give the same bases everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.runtime import parallel
from duallora.storage.learned import Learned

RELATIVE_RANK = 1e-6  # an eigenvalue below this share of the largest one of S is round-off, not a direction
# The expected row norm of LoRA's Kaiming initialisation, so that step sizes match ordinary LoRA.
DESIGNED_SCALE = 3**-0.5


def energy_share(threshold: float, task: int) -> float:
    """Share of the energy to protect after ``task`` (from 0); it grows, because what is cut off adds up."""
    return max(threshold, min(0.995, 1.0 - (1.0 - threshold) * 0.9**task))


def top_eigenvectors(moment: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric matrix by falling eigenvalue; the largest entry of each is positive.

    Args:
        moment: (d, d), fp64.
        floor: directions whose eigenvalue does not exceed it are left out.

    Returns:
        Eigenvectors (d, m) and eigenvalues (m,).
    """
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > floor
    values, vectors = values[keep], vectors[:, keep]
    if vectors.shape[1]:
        largest = vectors.abs().argmax(0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()
    return vectors, values


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis (QR) of the span of ``columns`` (d x m); the columns keep their directions."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(columns)
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return signed


def random_basis(dim: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions (d x m), m at most d; fp64."""
    drawn = torch.randn(dim, min(columns, dim), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.contiguous()


class Subspace(Learned):
    """The directions that earlier tasks use at one place: ``Phi`` (d x m), in blocks ``N_j``, one a task.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.phi: Tensor
        self.register_buffer("phi", torch.zeros(dim, 0, dtype=torch.float64))
        self.sizes: Tensor  # columns of each task's block N_j
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.long))

    @property
    def free(self) -> int:
        """Directions not used by any task yet."""
        return self.dim - self.phi.shape[1]

    def block(self, task: int) -> Tensor:
        """The directions ``N_j`` (d x m_j) that task ``task`` added."""
        start = int(self.sizes[:task].sum())
        return self.phi[:, start : start + int(self.sizes[task])]

    def joined(self, basis: Tensor) -> Tensor:
        """Orthonormal basis of the span of ``Phi`` and of ``basis`` (d x r, orthonormal)."""
        u, size, _ = torch.linalg.svd(basis - self.phi @ (self.phi.T @ basis), full_matrices=False)
        return torch.cat([self.phi, u[:, size > 1e-5]], 1)  # QR makes up directions where basis adds none

    def complement(self, moment: Tensor) -> Tensor:
        """``P S P`` with ``P = I - Phi Phi^T``."""
        projector = torch.eye(self.dim, dtype=torch.float64) - self.phi @ self.phi.T
        return projector @ moment @ projector

    def design(self, moment: Tensor) -> Tensor:
        """All usable directions of ``S`` outside ``Phi`` (d x m, by falling energy); m = 0 if none."""

        def compute() -> tuple[Tensor]:
            return (top_eigenvectors(self.complement(moment), rank_floor(moment))[0][:, : self.free],)

        return parallel.once(compute)[0]

    def protected(self, moment: Tensor) -> Tensor:
        """Directions of ``S`` inside ``Phi`` by falling energy (d x m); none before the first task."""

        def compute() -> tuple[Tensor]:
            inside = self.phi @ self.phi.T
            vectors, _ = top_eigenvectors(inside @ moment @ inside, rank_floor(moment))
            return (vectors[:, : self.phi.shape[1]],)

        return parallel.once(compute)[0]

    def new_block(self, moment: Tensor, threshold: float) -> Tensor:
        """Fewest directions that lift the captured share of ``trace(S)`` to ``eps_t`` (d x m; m may be 0)."""
        return parallel.once(lambda: (self._new_block(moment, threshold),))[0]

    def _new_block(self, moment: Tensor, threshold: float) -> Tensor:
        target = energy_share(threshold, len(self.sizes)) * moment.trace()
        vectors, values = top_eigenvectors(self.complement(moment), rank_floor(moment))
        vectors, values = vectors[:, : self.free], values[: self.free]
        known = (self.phi.T @ moment @ self.phi).trace()
        if known >= target:
            return vectors[:, :0]
        needed = int((known + values.cumsum(0) < target).sum()) + 1
        return vectors[:, :needed]

    def grow(self, moment: Tensor, threshold: float) -> None:
        """Adds the block of the task just learned; ``moment`` (d, d) was measured after the task."""
        new = self.new_block(moment, threshold)
        # Laid out as after a save and a load: the same product in another layout differs in the last bit.
        joined = parallel.once(lambda: (orthonormal(torch.cat([self.phi, new], 1)),))[0]
        self.phi = joined.contiguous()
        self.sizes = torch.cat([self.sizes, torch.tensor([new.shape[1]])])


def own_directions(moment: Tensor, taken: Tensor) -> Tensor:
    """Directions of ``S`` outside the span of ``taken`` (d x r), by falling energy (d x m)."""

    def compute() -> tuple[Tensor]:
        used = orthonormal(taken)
        projector = torch.eye(moment.shape[0], dtype=torch.float64) - used @ used.T
        vectors, _ = top_eigenvectors(projector @ moment @ projector, rank_floor(moment))
        return (vectors[:, : moment.shape[0] - used.shape[1]],)

    return parallel.once(compute)[0]


def rank_floor(moment: Tensor) -> float:
    """What an eigenvalue of a moment (d, d) has to exceed to belong to a direction and not to round-off."""
    return RELATIVE_RANK * float(torch.linalg.eigvalsh(moment)[-1])
