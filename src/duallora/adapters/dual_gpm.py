"""DualGPM, the memory of InfLoRA (arXiv 2404.00228): a basis of the used directions, or of those left.

Row vectors, moments and fp64 as in :mod:`duallora.adapters.subspace`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duallora.adapters.subspace import DESIGNED_SCALE, rank_floor, top_eigenvectors
from duallora.runtime import parallel
from duallora.storage.learned import Learned


class DualGPM(Learned):
    """The directions that earlier tasks use, or those that they leave, whichever are fewer.

    ``M`` (d x m, orthonormal, fp64) spans the used directions while m <= d/2 (the released "remove"); then it
    is replaced once and for all by a basis of their complement ("retain").

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.basis: Tensor
        self.register_buffer("basis", torch.zeros(dim, 0, dtype=torch.float64))
        self.retain: Tensor  # whether the basis is that of the complement, 0 or 1
        self.register_buffer("retain", torch.tensor(0))

    @property
    def complement(self) -> Tensor:
        """Projector (d x d) onto what no earlier task uses."""
        projector = self.basis @ self.basis.T
        return projector if self.retain else torch.eye(len(projector), dtype=torch.float64) - projector

    @property
    def free(self) -> int:
        """Directions that no earlier task uses."""
        dim, columns = self.basis.shape
        return columns if self.retain else dim - columns

    def design(self, moment: Tensor, rank: int) -> Tensor:
        """``D_t`` (d x r'): top eigenvectors of ``P S P``, scaled; r' <= r directions have energy at all."""

        def compute() -> tuple[Tensor]:
            projector = self.complement
            vectors, _ = top_eigenvectors(projector @ moment @ projector, rank_floor(moment))
            return (vectors[:, : min(rank, self.free)] * DESIGNED_SCALE,)

        return parallel.once(compute)[0]

    def grow(self, moment: Tensor, share: float) -> None:
        """Marks the fewest further directions as used that lift the captured energy of ``S`` to ``share``.

        Energy is ``|S|_F^2``, the sum of squared eigenvalues: with R = P S, what is captured is
        ``|S|_F^2 - |R|_F^2``; the directions are the left singular vectors of R by falling singular value.
        """
        basis, retain = parallel.once(lambda: self._grown(moment, share))
        self.basis, self.retain = basis.contiguous(), retain.long()

    def _grown(self, moment: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The new basis, and whether it is that of the complement."""
        residual = self.complement @ moment
        vectors, values, _ = torch.linalg.svd(residual)
        usable = min(self.free, int((values > rank_floor(moment)).sum()))
        vectors, energy = vectors[:, :usable], values[:usable].square()
        total, known = moment.square().sum(), moment.square().sum() - residual.square().sum()
        if known >= share * total:
            return self.basis, self.retain
        needed = int((known + energy.cumsum(0) < share * total).sum()) + 1
        new = vectors[:, :needed]
        if self.retain:
            left = self.basis - new @ (new.T @ self.basis)
            kept = self.free - new.shape[1]
            return torch.linalg.svd(left, full_matrices=False)[0][:, :kept], torch.tensor(True)
        joined = torch.cat([self.basis, new], 1)
        full, _ = torch.linalg.qr(joined, mode="complete")
        used = joined.shape[1]
        retain = 2 * used > len(full)
        return full[:, used:] if retain else full[:, :used], torch.tensor(retain)
