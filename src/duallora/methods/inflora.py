"""InfLoRA: a down-projection designed inside the complement of what earlier tasks use; the rest is trained.

"InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning" (CVPR 2024, arXiv 2404.00228). Row
vectors: the paper's ``W + A_t B_t`` acts on columns, so its dimensionality reduction ``B_t`` is ``D_t^T``
here and its trained ``A_t`` is ``U_t^T``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duallora.adapters.dual_gpm import DualGPM
from duallora.adapters.dual_lora import AdaptedQKV, part_of_place, saved_ranks
from duallora.adapters.moments import Moment, TokenReader, gather_moments
from duallora.adapters.subspace import energy_share, random_basis
from duallora.adapters.wrapped_qkv import adapted_layers, wrap_attention
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import AdaptedPlace, Loader, TaskInfo
from duallora.storage.learned import SideBySide


@dataclass(frozen=True)
class InfLoRAConfig(AdapterFields, MethodConfig):
    """Fields of InfLoRA.

    Attributes:
        rank: r, columns of the designed down-projection.
        lamb: eps of the first task, share of the squared eigenvalues that is protected; it grows with the
            tasks, see ``energy_share``.
        projections: which of q, k and v are adapted; they share a down-projection.
        learning_rate: learning rate of the up-projection.
    """

    lamb: float = 0.98

    def __post_init__(self) -> None:
        """Refuses a share that is none.

        Raises:
            DualLoRAError: naming the field.
        """
        super().__post_init__()
        if not 0 < self.lamb <= 1:
            raise DualLoRAError(f"lamb must lie in (0, 1], not {self.lamb}.")


class InfLoRA(Method):
    """A LoRA a task inside the complement of what earlier tasks use; its down-projection is not trained.

    ``y = x (W_0 + sum_{j<t} D_j U_j) + (x D_t) U_t``; ``U_t`` (r x out) starts at zero.
    """

    paper = "InfLoRA 2024 (2404.00228)"
    stores = "sum of D_j U_j, one basis a layer (at most d/2 columns), heads, class rows"
    leaves = "its share of the pooled covariance and of the bases, and of an update that is summed up already"
    config: InfLoRAConfig

    def __init__(
        self, backbone: Backbone, config: InfLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        layers, group = adapted_layers(backbone, config.first_adapted_layer), config.projections
        self.adapted = wrap_attention(backbone, layers, lambda qkv: AdaptedQKV(qkv, [group]))
        self.gpm = {layer: DualGPM(module.dim) for layer, module in self.adapted.items()}
        places = {str(n): SideBySide(m.groups[group], self.gpm[n]) for n, m in self.adapted.items()}
        self.learned.add_module("layers", nn.ModuleDict(places))
        self.reader = TokenReader(backbone.has_class_token, backbone.num_prefix_tokens)

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """A pass with the model as the last task left it designs ``D_t``; a single class trains nothing."""
        super().prepare(task, loader)
        group = self.config.projections
        if len(task.classes) == 1 or not self.config.rank:
            return
        with self._moments() as moments, torch.no_grad(), self.context.autocast():
            for batch in loader():
                self.backbone.project(batch.images, max(self.adapted))
        for layer, gpm in self.gpm.items():
            d = gpm.design(moments[layer, group].value, self.config.rank).float().to(self.device)
            if not d.shape[1]:
                warnings.warn(
                    f"layer {layer}: no direction is left outside the earlier tasks' subspace; nothing is "
                    f"learned there in {task.name!r}. A lower lamb leaves more room.",
                    stacklevel=2,
                )
            self.adapted[layer].groups[group].begin(task.index, d, d[:, :0])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``U_t`` beside the head."""
        trained = [p for m in self.adapted.values() for p in m.parameters() if p.requires_grad]
        rate = self.config.learning_rate
        return [*super().parameter_groups(), *([{"params": trained, "lr": rate}] if trained else [])]

    @torch.no_grad()
    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Merges ``D_t U_t``; one pass with it for the rows and for the directions that the task uses."""
        norms, group = [], self.config.projections
        for module in self.adapted.values():
            d, u = module.groups[group].a, module.groups[group].b
            change = 0.0 if d is None or u is None else float((d @ u).norm())
            norms.append(change / float(module.frozen_weight(group).norm()))
            module.merge()
        self.orthogonal_norm = sum(norms) / len(norms)
        with self._moments() as moments:
            features, labels = self.observe(loader)
        share = energy_share(self.config.lamb, task.index)
        for layer, gpm in self.gpm.items():
            gpm.grow(moments[layer, group].value, share)
        self.remember(task, features, labels)

    @torch.no_grad()
    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """With random factors of every task, and a basis of ``rank`` more columns for each."""
        generator, rank = self.generator(0, "measurement"), self.config.rank
        for layer, gpm in self.gpm.items():
            module = self.adapted[layer]
            for task in tasks:
                d = random_basis(module.dim, rank, generator).float().to(self.device)
                module.groups[self.config.projections].simulate(task.index, d, d[:, :0], generator)
            module.refresh()
            columns = min(rank * len(tasks), module.dim // 2)
            gpm.basis = random_basis(module.dim, columns, generator)

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task also ``D_t U_t``, while it is apart; the basis stays."""
        super().forget(task, kept)
        if not bool(kept.any()):
            for module in self.adapted.values():
                module.forget(task)

    @classmethod
    def places(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[AdaptedPlace]:
        """The merged update and the basis of every layer."""
        found: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                found[int(number)][rest] = tensor
        places = []
        for layer, own in sorted(found.items()):
            dim, columns = own["basis"].shape
            free = columns if bool(own["retain"]) else dim - columns
            rank, residual = saved_ranks(own)
            places.append(AdaptedPlace(layer, config["projections"], rank, residual, [], free))
        return places

    @classmethod
    def part_of(cls, name: str) -> str:
        """The update and the bases beside what every method has."""
        return part_of_place(name.split(".", 2)[2]) if name.startswith("layers.") else super().part_of(name)

    def restored(self) -> None:
        """Merges the updates."""
        super().restored()
        for module in self.adapted.values():
            module.refresh()

    def _moments(self) -> AbstractContextManager[dict[tuple[int, str], Moment]]:
        """Sums the moments of what enters the adapted projections while passes run inside the context."""
        attentions = {layer: self.backbone.attention(layer) for layer in self.adapted}
        return gather_moments(self.adapted, attentions, self.reader, "tokens")
