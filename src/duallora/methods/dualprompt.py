"""DualPrompt: general prompts for all tasks, and an expert prompt per task that the image's query finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.prefix import Prefix, halves, put_prefixes, small, uniform
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch


@dataclass(frozen=True)
class DualPromptConfig(MethodConfig):
    """Fields of DualPrompt.

    Attributes:
        g_layers: how many blocks, from the first one, get a general prompt; fewer on a shallow backbone.
        e_layers: how many blocks after them get an expert prompt; fewer on a shallow backbone.
        g_length: length of a general prompt, even; half of it are keys, half are values.
        e_length: the same for an expert prompt.
        pull: weight of the loss that draws a task's keys to the queries of its images.
        learning_rate: learning rate of prompts and keys.
    """

    positive: ClassVar[tuple[str, ...]] = ("g_layers", "e_layers", "g_length", "e_length")

    g_layers: int = 2
    e_layers: int = 3
    g_length: int = 6
    e_length: int = 20
    pull: float = 1.0
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        """Refuses a prompt that has no halves.

        Raises:
            DualLoRAError: naming the field.
        """
        super().__post_init__()
        for name in ("g_length", "e_length"):
            if getattr(self, name) % 2:
                raise DualLoRAError(f"{name} must be even, not {getattr(self, name)}.")


class Experts(nn.Module):
    """Expert prompts (L x d) of one block with their keys (d_q), one each a task.

    Args:
        length: L.
        dim: d, width of the tokens.
        query_dim: d_q, width of the query.
    """

    def __init__(self, length: int, dim: int, query_dim: int) -> None:
        super().__init__()
        self.length, self.dim, self.query_dim = length, dim, query_dim
        self.prompts, self.keys = nn.ParameterList(), nn.ParameterList()

    def grow(self, generator: torch.Generator, device: torch.device) -> None:
        """Freezes what is there and adds a task."""
        self.requires_grad_(False)
        prompt = uniform(self.length, self.dim, generator=generator)
        self.prompts.append(nn.Parameter(prompt.to(device)))
        self.keys.append(nn.Parameter(small(self.query_dim, generator=generator).to(device)))

    def similarity(self, query: Tensor) -> Tensor:
        """Cosines with the keys of all tasks (B, T); each image by itself, whatever its batch."""
        return F.cosine_similarity(query[:, None], torch.stack(list(self.keys)), dim=-1)

    def forward(self, task: Tensor) -> Tensor:
        """Prompts (B, L, d) of the tasks chosen for the images (B,)."""
        return torch.stack(list(self.prompts))[task]


class DualPrompt(Method):
    """Prefixes: one for all in the first blocks, that of the nearest key's task in the blocks after them."""

    paper = "DualPrompt 2022 (2204.04799)"
    stores = "general prompts, a prompt and key per task and block, heads, class rows"
    forward_passes: ClassVar[int] = 2
    config: DualPromptConfig

    def __init__(
        self, backbone: Backbone, config: DualPromptConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        g, e = prompted_blocks(config.g_layers, config.e_layers, backbone.depth)
        generator = self.generator(0, "adapter")
        general = [uniform(config.g_length, backbone.dim, generator=generator) for _ in range(g)]
        self.general = nn.ParameterList(nn.Parameter(prompt.to(self.device)) for prompt in general)
        self.experts = {
            layer: Experts(config.e_length, backbone.dim, backbone.feature_dim) for layer in range(g, g + e)
        }
        self.prefixes = put_prefixes(backbone, range(g + e))
        experts = {str(layer): pool for layer, pool in self.experts.items()}
        self.adapters.update({"general": self.general, **experts})

    def grow(self, task: int) -> None:
        """Adds the task's expert prompts and keys."""
        generator = self.generator(task, "expert prompts")
        for pool in self.experts.values():
            pool.grow(generator, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy with the task's own experts, and ``1 - cos(q, key)`` summed over blocks.

        Both are means over the images.
        """
        task = torch.full_like(batch.labels, len(self.heads.tasks) - 1)
        with self.context.autocast():
            query = self.query(batch.images)
            features = self._prompted(batch.images, dict.fromkeys(self.experts, task)).float()
        loss = self.class_loss.cross_entropy(self.heads.current(features), batch.labels)
        own = torch.stack([pool.similarity(query)[:, -1] for pool in self.experts.values()])
        return loss + self.config.pull * (1 - own).sum(0).mean()

    def extract(self, images: Tensor) -> Tensor:
        """Features of the backbone with each image's own choice of an expert in every block."""
        query = self.query(images)
        return self._prompted(
            images, {layer: pool.similarity(query).argmax(1) for layer, pool in self.experts.items()}
        )

    def _prompted(self, images: Tensor, chosen: dict[int, Tensor]) -> Tensor:
        """Features of the backbone with the experts of the tasks chosen by block, (B,) each."""
        prefixes: dict[int, Prefix] = {
            layer: halves(prompt.expand(images.shape[0], -1, -1)) for layer, prompt in enumerate(self.general)
        }
        prefixes |= {layer: halves(self.experts[layer](task)) for layer, task in chosen.items()}
        with self.prefixes.holding(prefixes):
            features: Tensor = self.backbone(images)
        return features


def prompted_blocks(general: int, expert: int, depth: int) -> tuple[int, int]:
    """How many blocks get general and expert prompts: as asked, or in that proportion, at least one each.

    Raises:
        DualLoRAError: the backbone has a single block.
    """
    if depth < 2:
        raise DualLoRAError("dualprompt needs a backbone of two blocks, for a general and an expert prompt.")
    if general + expert > depth:
        general = min(max(round(depth * general / (general + expert)), 1), depth - 1)
        expert = depth - general
    return general, expert
