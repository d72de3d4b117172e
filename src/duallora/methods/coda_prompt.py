"""CODA-Prompt: prefixes that are sums of components, weighted by how well each fits the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.prefix import halves, put_prefixes
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch


@dataclass(frozen=True)
class CodaPromptConfig(MethodConfig):
    """Fields of CODA-Prompt.

    Attributes:
        layers: how many blocks, from the first one, get a prompt; at most all.
        components_per_task: new components of a task in every prompted block.
        prompt_length: L, even; half of a prompt are keys, half are values.
        mu: weight of the penalty that keeps components orthogonal.
        learning_rate: learning rate of the components.
    """

    positive: ClassVar[tuple[str, ...]] = ("layers", "components_per_task", "prompt_length")

    layers: int = 5
    components_per_task: int = 10
    prompt_length: int = 8
    mu: float = 0.0
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        """Refuses a prompt that has no halves.

        Raises:
            DualLoRAError: naming the field.
        """
        super().__post_init__()
        if self.prompt_length % 2:
            raise DualLoRAError(f"prompt_length must be even, not {self.prompt_length}.")


class Components(nn.Module):
    """The components of one block: prompts P (L x d), keys K and attention vectors A (d_q), by task.

    Args:
        length: L.
        dim: d, width of the tokens.
        query_dim: d_q, width of the query.
    """

    def __init__(self, length: int, dim: int, query_dim: int) -> None:
        super().__init__()
        self.length, self.dim, self.query_dim = length, dim, query_dim
        self.p, self.k, self.a = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()

    def grow(self, count: int, generator: torch.Generator, device: torch.device) -> None:
        """Freezes what is there and adds ``count`` components orthogonal to it."""
        self.requires_grad_(False)
        for group, width in (
            (self.p, self.length * self.dim),
            (self.k, self.query_dim),
            (self.a, self.query_dim),
        ):
            old = torch.cat([*(x.detach().cpu().flatten(1) for x in group), torch.zeros(0, width)])
            new = orthonormal_rows(old, count, generator).to(device)
            group.append(nn.Parameter(new.unflatten(1, (self.length, -1)) if group is self.p else new))

    def weights(self, query: Tensor) -> Tensor:
        """``w_k = cos(q * A_k, K_k)`` (B, M) for queries (B, d_q)."""
        a, k = torch.cat(list(self.a)), F.normalize(torch.cat(list(self.k)))
        # The products with all components at once: q * A_k itself would be (B, M, d_q).
        norm = (query.square() @ a.square().T).clamp_min(1e-16).sqrt()
        return (query @ (a * k).T) / norm

    def forward(self, query: Tensor) -> Tensor:
        """Prompts ``sum_k w_k P_k`` (B, L, d)."""
        return torch.einsum("bm,mld->bld", self.weights(query), torch.cat(list(self.p)))

    def penalty(self) -> Tensor:
        """Mean square of the entries of ``Z Z^T - I``, summed over P (flattened), K and A."""
        total = torch.zeros((), device=self.k[0].device)
        for group in (self.p, self.k, self.a):
            z = torch.cat(list(group)).flatten(1)
            total = total + (z @ z.T - torch.eye(len(z), device=z.device)).square().mean()
        return total


class CodaPrompt(Method):
    """Prefixes ``sum_k w_k P_k`` in the first blocks; earlier tasks' components stay in the sum, frozen."""

    paper = "CODA-Prompt 2023 (2211.13218)"
    stores = "prompt components with key and attention vector, heads, class rows"
    forward_passes: ClassVar[int] = 2
    config: CodaPromptConfig

    def __init__(
        self, backbone: Backbone, config: CodaPromptConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        layers = range(min(config.layers, backbone.depth))
        self.prefixes = put_prefixes(backbone, layers)
        self.pools = {
            layer: Components(config.prompt_length, backbone.dim, backbone.feature_dim) for layer in layers
        }
        self.adapters.update({str(layer): pool for layer, pool in self.pools.items()})

    def grow(self, task: int) -> None:
        """Adds the task's components."""
        generator = self.generator(task, "adapter")
        for pool in self.pools.values():
            pool.grow(self.config.components_per_task, generator, self.device)

    def pretend(self, task: int) -> None:
        """Components that are random alone: orthogonal ones take minutes for many tasks."""
        generator, count = self.generator(task, "adapter"), self.config.components_per_task
        for pool in self.pools.values():
            shapes = (
                (pool.p, (count, pool.length, pool.dim)),
                *((g, (count, pool.query_dim)) for g in (pool.k, pool.a)),
            )
            for group, shape in shapes:
                drawn = F.normalize(torch.randn(shape, generator=generator).flatten(1)).view(shape)
                group.append(nn.Parameter(drawn.to(self.device), requires_grad=False))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy on the current classes, and the penalty of every block."""
        loss = super().loss(batch)
        if self.config.mu:
            loss = loss + self.config.mu * torch.stack([p.penalty() for p in self.pools.values()]).sum()
        return loss

    def extract(self, images: Tensor) -> Tensor:
        """Features of the backbone with the images' prompts; the query is that of the bare backbone."""
        query = self.query(images)
        with torch.autocast(images.device.type, enabled=False):
            prompts = {layer: halves(pool(query)) for layer, pool in self.pools.items()}
        with self.prefixes.holding(prompts):
            features: Tensor = self.backbone(images)
        return features


def orthonormal_rows(old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random unit rows by Gram-Schmidt, orthogonal to old rows and to each other as long as there is room.

    When old and new rows span the whole space, the procedure starts over: the next rows are orthogonal only
    to those that are drawn after this point. The old ones need not be independent.

    Args:
        old: (m, n).
        count: how many.
        generator: draws; the same number whatever ``old`` is.

    Returns:
        (count, n), fp32.
    """
    _, values, directions = torch.linalg.svd(old.double(), full_matrices=False)
    basis = directions[values > 1e-6 * values.max()] if len(old) else directions
    rows = []
    for drawn in torch.randn(count, old.shape[1], generator=generator).double():
        if len(basis) >= old.shape[1]:
            basis = basis[:0]
        row = drawn
        for _ in range(2):  # once is not enough where little of the drawn row is left
            row = row - (row @ basis.T) @ basis
        row = row / row.norm()
        basis = torch.cat([basis, row[None]])
        rows.append(row)
    return torch.stack(rows).float()
