"""SD-LoRA: every task adds a direction, and the magnitudes of all directions go on being trained.

"SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning" (ICLR 2025, arXiv
2501.13198).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from duallora.adapters.task_loras import Pairs
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Loader, TaskInfo


@dataclass(frozen=True)
class SDLoRAConfig(AdapterFields, MethodConfig):
    """Fields of SD-LoRA.

    Attributes:
        rank: r, rank of a task's pair in each projection.
        rank_reduction: SD-LoRA-RR: the rank falls to 8/10 at the fifth task and to 6/10 at the ninth.
        magnitude: where the magnitude of a new direction starts.
        reset_magnitudes: the released behaviour: earlier directions are normalised one by one and all
            magnitudes start anew in every task, so that the model jumps between tasks.
        learning_rate: learning rate of the pair and of all magnitudes.
    """

    positive: ClassVar[tuple[str, ...]] = ("magnitude",)

    rank_reduction: bool = False
    magnitude: float = 0.8
    reset_magnitudes: bool = False
    projections: Literal["qv", "kv", "qkv"] = "qv"


class SDLoRA(Method):
    """Every task adds a low-rank direction; the magnitudes of all directions go on being trained.

    ``y = x (W_0 + sum_i a_i A_i B_i)``; trained are the newest pair and every ``a_i``. These scalars are
    shared by all layers and projections. When a later task trains, the earlier pairs are directions: frozen,
    and of norm 1, see :meth:`normalise`.
    """

    paper = "SD-LoRA 2025 (2501.13198)"
    stores = "a pair and a magnitude a task, heads, class rows"
    config: SDLoRAConfig

    def __init__(
        self, backbone: Backbone, config: SDLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.magnitudes = nn.ParameterList()
        self.pairs: list[Pairs] = []
        self.attach(config.first_adapted_layer, config.projections, self._make)
        self.adapters["magnitudes"] = self.magnitudes

    def _make(self, dim: int, out: int) -> Pairs:
        pairs = Pairs(dim, out, len(self.config.projections), lambda: list(self.magnitudes))
        self.pairs.append(pairs)
        return pairs

    def grow(self, task: int) -> None:
        """A pair with zero B in every layer and a magnitude; earlier pairs freeze, magnitudes do not."""
        rank, generator = self.config.rank, self.generator(task, "adapter")
        if self.config.rank_reduction:
            rank = -(-rank * (10, 8, 6)[min(task // 4, 2)] // 10)
        for pairs in self.pairs:
            pairs.open(rank, generator, self.device)
        self.magnitudes.append(nn.Parameter(torch.tensor(self.config.magnitude, device=self.device)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head, the newest pair, and each magnitude at a rate in proportion to its size.

        Adam's steps do not grow with a parameter: a magnitude that took over a norm would hardly move. Those
        of SGD do, so that there all have the same rate, as in the paper.
        """
        rate, pairs = self.config.learning_rate, [p for pair in self.pairs for p in pair.parameters()]
        groups = [super().parameter_groups()[0]]
        groups.append({"params": [p for p in pairs if p.requires_grad], "lr": rate})
        for magnitude in self.magnitudes:
            growth = abs(float(magnitude.detach())) / self.config.magnitude
            adaptive = self.config.optimizer != "sgd"
            groups.append({"params": [magnitude], "lr": rate * max(growth, 1.0) if adaptive else rate})
        return groups

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Turns the pair trained last into a direction; a single class trains nothing and moves nothing."""
        super().prepare(task, loader)
        if len(task.classes) > 1:
            self.normalise(task.index)

    @torch.no_grad()
    def normalise(self, task: int) -> None:
        """Brings the newest trained pair of the tasks before ``task`` to norm 1.

        Kept magnitudes: ``n``, the root mean square of ``|A||B|`` over layers and projections, moves from B
        to the magnitude, and the model stays as it is. ``reset_magnitudes``: every B is divided by its own
        ``|A||B|``, and all magnitudes start anew. The pair of a single class has B = 0 and stays so.
        """
        for last in reversed(range(task)):
            sizes = torch.stack([pairs.sizes(last) for pairs in self.pairs])  # L x P
            norm = sizes.square().mean().sqrt()
            if not norm:
                continue
            own = sizes if self.config.reset_magnitudes else norm.expand_as(sizes)
            for pairs, n in zip(self.pairs, torch.where(sizes > 0, own, 1.0), strict=True):
                pairs.b[last].div_(n[:, None, None])
            self.magnitudes[last].mul_(norm)
            break
        if self.config.reset_magnitudes:
            for magnitude in self.magnitudes:
                magnitude.fill_(self.config.magnitude)
