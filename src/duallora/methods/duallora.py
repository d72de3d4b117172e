"""DualLoRA: an orthogonal adapter for stability, a residual adapter for plasticity, a memory that gates it.

"Dual Low-Rank Adaptation for Continual Learning with Pre-Trained Models" (arXiv 2411.00623). What is the
paper's and what is ours stands in ``docs/method.md``, section by section in the order of this file.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from duallora.adapters.dual_lora import AdaptedQKV, DualAdapter, part_of_place, saved_ranks
from duallora.adapters.dynamic_memory import DynamicMemory, EnergyMemory, GatePoint
from duallora.adapters.moments import TokenReader, check_moments
from duallora.adapters.subspace import DESIGNED_SCALE, Subspace, own_directions, random_basis
from duallora.adapters.wrapped_qkv import adapted_layers, wrap_attention
from duallora.backbones.backbone import Backbone
from duallora.methods.base import Method
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.duallora_config import DualLoRAConfig
from duallora.methods.head_starts import imprint, imprint_again, lead, settle
from duallora.methods.interface import AdaptedPlace, Batch, Encoding, Loader, TaskInfo
from duallora.methods.probation import Probation, harmed
from duallora.methods.task_pass import Place, Seen, look
from duallora.storage.learned import SideBySide

# A domain's first task may change all that its images show, which O may not: it learns so much faster.
RESIDUAL_RATE = 2.0


class DualLoRA(Method):
    """An orthogonal LoRA where earlier tasks have no energy, a residual one gated per image by a memory."""

    paper = "DualLoRA 2024 (2411.00623)"
    stores = "factors of O, bases and C of R, Phi, heads, class rows, gate rows"
    leaves = "its share of the pooled covariances, Phi, summed up updates and its domain's residual adapter"
    reconstruction = True
    readout: ClassVar[Literal["heads", "calibrated"]] = "calibrated"
    imprinted: ClassVar[bool] = True
    config: DualLoRAConfig

    def __init__(
        self, backbone: Backbone, config: DualLoRAConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        check_moments(backbone, config.moments)
        layers = adapted_layers(backbone, config.first_adapted_layer)
        groups = [config.projections] if config.moments == "tokens" else list(config.projections)
        selected = config.top_tasks if config.gate != "off" else 1 << 30
        self.adapted = wrap_attention(backbone, layers, lambda qkv: AdaptedQKV(qkv, groups, selected))
        self.subspaces: dict[Place, Subspace] = {
            (layer, group): Subspace(module.dim) for layer, module in self.adapted.items() for group in groups
        }
        reader = TokenReader(backbone.has_class_token, backbone.num_prefix_tokens)
        self.memory = DynamicMemory(config.gate, self._gate_points(layers, groups[-1], reader), reader)
        # Energies are read for the posterior even without R.
        if config.residual != "none" or self.memory.points:
            for layer, module in self.adapted.items():
                module.gate = lambda x, layer=layer: self.memory.gate(layer, x)
        layers_of = nn.ModuleDict()
        for layer, module in self.adapted.items():
            places = {g: SideBySide(module.groups[g], self.subspaces[layer, g]) for g in groups}
            layers_of[str(layer)] = nn.ModuleDict(places)
        self.learned.add_module("layers", layers_of)
        points = {str(layer): point for layer, point in self.memory.points.items()}
        self.learned.add_module("gate", nn.ModuleDict(points))
        self.learned.add_module("domains", self.memory.domains)
        self.probation = Probation(self.device)
        self.learned.add_module("probation", self.probation)

    # -- before the task -------------------------------------------------------------------------------------

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """One pass with the model as the last task left it: the head's start, gate rows, A_t and Psi_t."""
        super().prepare(task, loader)
        seen = self._pass(loader)
        known = self.config.known_domain if self._by_domain else math.inf
        self.memory.join(task.index, seen.gate, known, self._with_adapters())
        owner = self.memory.domains.uses[task.index]
        seen = self._proved(owner, task, seen, loader)
        imprint(self, task, seen.features, seen.labels)
        threshold = self.config.energy_threshold
        blocks = {p: s.new_block(seen.moments[p].value, threshold) for p, s in self._energy_places()}
        self._update_gate(task, seen, blocks)
        # A single class trains nothing, and zeros need no place. In a known domain features stay as its first
        # task made them, and rows where they are.
        if len(task.classes) == 1 or owner != task.index:
            return
        self.probation.clear()
        if self._by_domain and not self._with_adapters():
            # Beside other adapters the gate, once it knows the task, gives its images other features.
            self.probation.begin(self.rows, owner)
        if self._by_domain or (self.config.residual == "none" and owner == 0):
            lead(self, task)
        for place, subspace in self.subspaces.items():
            self._open(task, place, subspace, seen.moments[place].value)

    def _proved(self, owner: int, task: TaskInfo, seen: Seen, loader: Loader) -> Seen:
        """Takes a domain's adapters away if its second task's images are told apart worse with them.

        The first task's rows are then as they were before it trained.

        Returns:
            What the task's pass sees from then on.
        """
        apart = not self.config.rank or all(owner in adapter.owners for adapter in self._adapters)
        if owner not in self.probation or len(task.classes) == 1 or not apart:
            return seen
        with ExitStack() as stack:
            for module in self.adapted.values():
                stack.enter_context(module.without(owner))
            plain = self._pass(loader)
        if not harmed(seen.features, plain.features, seen.labels, len(task.classes)):
            self.probation.discard(owner)
            return seen
        for module in self.adapted.values():
            module.forget(owner, owner)
        self.probation.restore(self.rows, owner)
        imprint_again(self, owner)
        return plain

    def _open(self, task: TaskInfo, place: Place, subspace: Subspace, moment: Tensor) -> None:
        """Designs ``A_t`` inside the complement of earlier tasks and ``Psi_t`` where ``residual`` says."""
        config = self.config
        free = subspace.design(moment)
        a = free[:, : config.rank]
        candidates = {
            "next": lambda: free[:, config.rank :],
            "protected": lambda: subspace.protected(moment),
            "own": lambda: own_directions(moment, a),
            "none": lambda: free[:, :0],
        }
        moves = self._by_domain and config.residual == "own"
        if moves:
            # No other domain sees what R learns: it starts in the strongest directions, O takes what is left.
            psi = own_directions(moment, free[:, :0])[:, : config.residual_rank]
            a = own_directions(moment, torch.cat([subspace.phi, psi], 1))[:, : config.rank]
        else:
            psi = candidates[config.residual]()[:, : config.residual_rank]
        if config.rank and not a.shape[1]:
            warnings.warn(
                f"layer {place[0]} ({place[1]}): no direction is left outside the earlier tasks' subspace; O "
                f"learns nothing there in {task.name!r}. A lower energy_threshold leaves more room.",
                stacklevel=2,
            )
        starts = (a * DESIGNED_SCALE, psi * DESIGNED_SCALE if moves else psi)
        a, psi = (basis.float().to(self.device) for basis in starts)
        self.adapted[place[0]].groups[place[1]].begin(task.index, a, psi, moves)

    # -- during the task -------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """B_t, C_t and, where it moves, Psi_t beside the head."""
        named = [x for m in self.adapted.values() for x in m.named_parameters() if x[1].requires_grad]
        rate = self.config.learning_rate
        groups = super().parameter_groups()
        for residual, times in ((False, 1.0), (True, RESIDUAL_RATE if self._by_domain else 1.0)):
            some = [p for name, p in named if name.endswith((".c", ".psi")) == residual]
            groups += [{"params": some, "lr": rate * times}] if some else []
        return groups

    def batch_features(self, batch: Batch) -> Tensor:
        """Features (n, row_dim), each image left out of its own row in the gate."""
        return self._encoded(batch, own=True).features

    # -- after the task --------------------------------------------------------------------------------------

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Merges O, freezes R; a pass over the task's images grows ``Phi`` and replaces the gate's rows."""
        self.orthogonal_norm, self.residual_norm = self._norms()
        for module in self.adapted.values():
            module.merge()
        seen = self._pass(loader, own=True)
        for place, subspace in self.subspaces.items():
            subspace.grow(seen.moments[place].value, self.config.energy_threshold)
        blocks = {place: subspace.block(task.index) for place, subspace in self._energy_places()}
        self._update_gate(task, seen, blocks)
        self.remember(task, seen.features, seen.labels)
        self.probation.trained(self.rows, task.index)
        settle(self, task)
        self.memory.release()

    @torch.no_grad()
    def _norms(self) -> tuple[float, float]:
        """``|A_t B_t| / |W_0|`` and ``|Psi_t C_t| / |W_0|`` (Frobenius), mean over layers and groups."""

        def share(left: Tensor | None, right: Tensor | None, frozen: Tensor) -> float:
            return 0.0 if left is None or right is None else float((left @ right).norm() / frozen)

        found = []
        for layer, group in self.subspaces:
            adapter = self.adapted[layer].groups[group]
            frozen = self.adapted[layer].frozen_weight(group).norm()
            found.append((share(adapter.a, adapter.b, frozen), share(adapter.psi, adapter.c, frozen)))
        orthogonal, residual = zip(*found, strict=True)
        return sum(orthogonal) / len(found), sum(residual) / len(found)

    # -- readouts --------------------------------------------------------------------------------------------

    def encode(self, images: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Encoding:
        """A forward pass with the gate's weights.

        Args:
            images: (n, 3, H, W).
            own: labels and indices (n,) of images of the current task: each is left out of its own gate row.
        """
        with self.memory.reading(own) as seen:
            features = self.backbone(images).float()
        gate = None if self.config.residual == "none" else seen.mean_weights
        gate = gate if gate is None else gate[:, self.memory.domains.uses]
        return Encoding(features, gate, seen.features)

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, row_dim) of images that may be of any task."""
        return self.encode(images).features

    def task_posterior(self, encoding: Encoding, log_q: Tensor) -> Tensor:
        """From the rows on the final feature; by energy with ``calibration="task"`` from the gate's."""
        if self.config.relevance == "energy" and self.config.calibration == "task":
            layer, point = next(iter(self.memory.points.items()))
            if point.energy is not None:
                return point.energy.log_posterior(encoding.gate_features[layer])
        return super().task_posterior(encoding, log_q)

    # -- forgetting ------------------------------------------------------------------------------------------

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task its factors while they are apart, and R if no other task uses it.

        ``Phi`` stays: what later tasks were kept away from is no property of the forgotten task alone.
        """
        super().forget(task, kept)
        self.probation.forget(task, kept)
        for point in self.memory.points.values():
            point.forget(task, kept)
        if not bool(kept.any()):
            uses, left = self.memory.domains.uses, set(self.rows.task.tolist())
            shared = any(uses[other] == uses[task] for other in left)
            for module in self.adapted.values():
                module.forget(task, None if shared else uses[task])
        self.memory.release()

    # -- state -----------------------------------------------------------------------------------------------

    @classmethod
    def places(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[AdaptedPlace]:
        """Adapters and ``Phi`` of every layer and group."""
        found: dict[Place, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, layer, group, rest = name.split(".", 3)
                found[int(layer), group][rest] = tensor
        return [
            AdaptedPlace(
                layer,
                group,
                *saved_ranks(own),
                own["sizes"].tolist(),
                own["phi"].shape[0] - own["phi"].shape[1],
            )
            for (layer, group), own in sorted(found.items())
        ]

    @classmethod
    def part_of(cls, name: str) -> str:
        """Orthogonal and residual adapters, bases and the gate beside what every method has."""
        return part_of_place(name.split(".", 3)[3]) if name.startswith("layers.") else super().part_of(name)

    def restored(self) -> None:
        """Merges the updates; the gate knows as many tasks as there are heads."""
        super().restored()
        for module in self.adapted.values():
            module.refresh()
        self.memory.tasks = len(self.heads.tasks)
        self.memory.domains.restored(self.memory.tasks)

    @torch.no_grad()
    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """With random adapters and gate rows, and a ``Phi`` that leaves room for the next task's adapters.

        Until then it grows by a twentieth of all directions a task, about as on real images.
        """
        config, generator = self.config, self.generator(0, "measurement")
        self.memory.domains.note([0 if self._by_domain else task.index for task in tasks])
        wide = config.residual_rank if config.residual != "none" else 0
        for (layer, group), subspace in self.subspaces.items():
            module = self.adapted[layer]
            for task in tasks:
                basis = random_basis(module.dim, config.rank + wide, generator).float().to(self.device)
                a, psi = basis[:, : config.rank].contiguous(), basis[:, config.rank :].contiguous()
                own = self.memory.domains.uses[task.index] == task.index
                a, psi = a[:, : None if own else 0], psi[:, : None if own else 0]
                module.groups[group].simulate(task.index, a, psi, generator)
            room = max(module.dim - config.rank - config.residual_rank, 0)
            columns = min(max(module.dim // 20, 1) * len(tasks), room)
            subspace.phi = random_basis(module.dim, columns, generator)
            shares = torch.arange(columns).tensor_split(max(len(tasks), 1))
            subspace.sizes = torch.tensor([len(share) for share in shares])
        for module in self.adapted.values():
            module.refresh()
        for point in self.memory.points.values():
            point.simulate([len(task.classes) for task in tasks], generator)
        self.memory.tasks = len(tasks)

    # -- helpers ---------------------------------------------------------------------------------------------

    @property
    def _by_domain(self) -> bool:
        """Whether tasks of one domain share a residual adapter."""
        return self.config.residual != "none" and self.config.gate != "off" and self.config.known_domain <= 1

    @property
    def _adapters(self) -> list[DualAdapter]:
        """Those of all layers and groups."""
        return [adapter for module in self.adapted.values() for adapter in module.groups.values()]

    def _with_adapters(self) -> set[int]:
        """First tasks of domains that have a residual adapter."""
        return {part.task for adapter in self._adapters for part in adapter.residuals}

    def _gate_points(self, layers: list[int], group: str, reader: TokenReader) -> dict[int, GatePoint]:
        """Gate points by layer; relevance by energy takes the bases of v where every group has its own."""
        config, energy = self.config, self.config.relevance == "energy"
        posterior = energy and config.calibration == "task"
        if (config.residual == "none" or config.gate == "off") and not posterior:
            return {}
        read = layers if config.gate == "layer" and config.residual != "none" else layers[:1]
        points = {}
        for layer in read:
            memory = EnergyMemory(self.subspaces[layer, group], self.device) if energy else None
            width = reader.parts(layer) * self.adapted[layer].dim
            points[layer] = GatePoint(width, self.device, config.top_tasks, memory)
        return points

    def _energy_places(self) -> list[tuple[Place, Subspace]]:
        points = self.memory.points
        return [
            (place, subspace)
            for place, subspace in self.subspaces.items()
            if place[0] in points and place[1][-1] == "v" and points[place[0]].energy is not None
        ]

    def _update_gate(self, task: TaskInfo, seen: Seen, blocks: dict[Place, Tensor]) -> None:
        """Rows (and bases) of the task at every gate point, from the features of the pass just made."""
        by_layer = {layer: block for (layer, _), block in blocks.items()}
        for layer, point in self.memory.points.items():
            point.learn(task.index, seen.gate[layer], seen.labels, len(task.classes), by_layer.get(layer))
        self.memory.tasks = task.index + 1

    def _pass(self, loader: Loader, own: bool = False) -> Seen:
        """A pass over the task's images; ``own`` leaves each out of its own row in the gate."""
        encode = partial(self._encoded, own=own)
        return look(loader, encode, self.memory, self.adapted, self.backbone, self.config.moments)

    def _encoded(self, batch: Batch, own: bool) -> Encoding:
        """A forward pass over images of the current task; ``own`` as for :meth:`_pass`."""
        with self.context.autocast():
            return self.encode(batch.images, (batch.labels, batch.indices) if own else None)
