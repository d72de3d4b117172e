"""O-LoRA: a LoRA pair a task whose down-projection is pushed to be orthogonal to the earlier ones.

"Orthogonal Subspace Learning for Language Model Continual Learning" (Findings of EMNLP 2023, arXiv
2310.14152).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duallora.adapters.task_loras import Pairs
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Loader, TaskInfo


@dataclass(frozen=True)
class OLoRAConfig(AdapterFields, MethodConfig):
    """Fields of O-LoRA.

    Attributes:
        rank: r, rank of a task's pair in each projection.
        lamda_1: weight of the orthogonality term.
        lamda_2: weight of the norm of the new pair.
        overlap: the orthogonality term sums absolute values (the released code) or squares (the paper).
        learning_rate: learning rate of the pair.
    """

    lamda_1: float = 0.5
    lamda_2: float = 0.0
    overlap: Literal["absolute", "squared"] = "absolute"
    projections: Literal["qv", "kv", "qkv"] = "qv"


class OLoRA(Method):
    """A LoRA pair a task, all active; the new down-projection is pushed to be orthogonal to the earlier ones.

    ``y = x (W_0 + sum_i A_i B_i)``; the newest pair is trained, the earlier ones are frozen.
    """

    paper = "O-LoRA 2023 (2310.14152)"
    stores = "a pair a task, heads, class rows"
    config: OLoRAConfig

    def __init__(
        self, backbone: Backbone, config: OLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.pairs: list[Pairs] = []
        self.attach(config.first_adapted_layer, config.projections, self._make)

    def _make(self, dim: int, out: int) -> Pairs:
        self.pairs.append(Pairs(dim, out, len(self.config.projections)))
        return self.pairs[-1]

    def grow(self, task: int) -> None:
        """A pair with zero B in every layer; the earlier ones freeze."""
        generator = self.generator(task, "adapter")
        for pairs in self.pairs:
            pairs.open(self.config.rank, generator, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy on the current classes + ``lamda_1`` orthogonality + ``lamda_2`` norm."""
        loss, config = super().loss(batch), self.config
        if config.lamda_1 and len(self.heads.tasks) > 1:
            loss = loss + config.lamda_1 * self.orthogonality()
        if config.lamda_2:
            loss = loss + config.lamda_2 * self.size()
        return loss

    def orthogonality(self) -> Tensor:
        """Sum of ``|A_i^T A_t|``, or its squares, over entries, earlier tasks i, projections and layers."""
        products = [torch.cat(list(p.a)[:-1], 2).transpose(1, 2) @ p.a[-1] for p in self.pairs]
        power = 2 if self.config.overlap == "squared" else 1
        return torch.stack([product.abs().pow(power).sum() for product in products]).sum()

    def size(self) -> Tensor:
        """Sum of the L2 norms (not squared) of A_t and B_t over projections and layers."""
        factors = [factor for pairs in self.pairs for factor in (pairs.a[-1], pairs.b[-1])]
        return torch.stack([factor.norm(dim=(1, 2)).sum() for factor in factors]).sum()

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Merges all pairs; that of a single class learned nothing, so later tasks need not avoid its A."""
        if len(task.classes) == 1:
            for pairs in self.pairs:
                pairs.a[-1].zero_()
        super().consolidate(task, loader)
