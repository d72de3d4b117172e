"""CLoRA: the updates of all layers are built from one set of shared low-rank bases. Not ``c-lora``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.lora import kaiming
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch


@dataclass(frozen=True)
class SharedLoRAConfig(AdapterFields, MethodConfig):
    """Fields of CLoRA.

    Attributes:
        rank: r; each shared pair has rank r/2 (rounded up).
        pairs: n, number of shared pairs (D_i, U_i).
        diversity: weight of SADE, the mean squared cosine between different shared matrices.
    """

    positive: ClassVar[tuple[str, ...]] = ("pairs",)

    pairs: int = 4
    diversity: float = 0.1


class Bases(nn.Module):
    """The pairs side by side: D (d x n k), drawn as in LoRA, and U (n k x out), zero.

    Args:
        dim: d.
        out: columns written.
        pairs: n.
        rank: k, rank of one pair.
        generator: draws D.
    """

    def __init__(self, dim: int, out: int, pairs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.pairs = pairs
        self.d = nn.Parameter(kaiming(dim, pairs * rank, generator))
        self.u = nn.Parameter(torch.zeros(pairs * rank, out))

    def similarity(self) -> Tensor:
        """SADE: mean of ``cos^2(D_i, D_j)`` and ``cos^2(U_i, U_j)`` over i < j, matrices taken as vectors.

        A matrix that is zero is similar to none.
        """
        i, j = torch.triu_indices(self.pairs, self.pairs, 1, device=self.d.device)
        if not len(i):
            return self.d.new_zeros(())
        down, up = (F.normalize(flat.reshape(self.pairs, -1), dim=1) for flat in (self.d.T, self.u))
        cosines = torch.cat([(side[i] * side[j]).sum(1) for side in (down, up)])
        return cosines.square().mean()


class Combined(nn.Module):
    """The update of one layer, ``sum_i (x D_i diag(c_i)) U_i``; its own parameter is c (n x k), all ones.

    Args:
        bases: those of all layers.
    """

    def __init__(self, bases: Bases) -> None:
        super().__init__()
        # In a tuple: as an attribute of its own it would be saved once for every layer.
        self.shared = (bases,)
        self.c = nn.Parameter(torch.ones(bases.pairs, len(bases.u) // bases.pairs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, out)."""
        (bases,) = self.shared
        return ((x @ bases.d) * self.c.flatten()) @ bases.u

    def delta_weight(self) -> Tensor:
        """``sum_i D_i diag(c_i) U_i`` (d x out)."""
        (bases,) = self.shared
        return (bases.d * self.c.flatten()) @ bases.u


class SharedLoRA(Method):
    """``dW_l = sum_i D_i diag(c_{l,i}) U_i``; D, U and c go on learning from task to task, unprotected."""

    paper = "CLoRA, Liu et al. 2025 (2512.24603), used sequentially"
    stores = "one set of shared pairs, c per layer, heads, class rows"
    reconstruction = True
    config: SharedLoRAConfig

    def __init__(
        self, backbone: Backbone, config: SharedLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator, made = self.generator(0, "adapter"), list[Bases]()

        def make(dim: int, out: int) -> Combined:
            if not made:
                half = (config.rank + 1) // 2
                made.append(Bases(dim, out, config.pairs, half, generator).to(self.device))
            return Combined(made[0])

        self.attach(config.first_adapted_layer, config.projections, make)
        (self.bases,) = made
        self.adapters["shared"] = self.bases

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy and SADE."""
        return super().loss(batch) + self.config.diversity * self.bases.similarity()
