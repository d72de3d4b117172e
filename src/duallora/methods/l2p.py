"""L2P: each image takes prompts from a pool and adds them to its tokens; a head reads their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from duallora.adapters.prefix import ExtraTokens, small, uniform
from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch


@dataclass(frozen=True)
class L2PConfig(MethodConfig):
    """Fields of L2P.

    Attributes:
        pool_size: prompts in the pool.
        prompt_length: tokens of a prompt.
        top_k: prompts that an image takes.
        pull: weight of the loss that draws the chosen keys to the query.
        learning_rate: learning rate of prompts and keys.
    """

    positive: ClassVar[tuple[str, ...]] = ("pool_size", "prompt_length", "top_k")

    pool_size: int = 10
    prompt_length: int = 5
    top_k: int = 5
    pull: float = 0.5
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        """Refuses to take more prompts than there are.

        Raises:
            DualLoRAError: naming the fields.
        """
        super().__post_init__()
        if self.top_k > self.pool_size:
            raise DualLoRAError(f"top_k must be at most pool_size ({self.pool_size}), not {self.top_k}.")


class Pool(nn.Module):
    """Prompts (M x L x d) and their keys (M x d_q), shared by all tasks.

    Args:
        prompts: as drawn.
        keys: as drawn.
    """

    def __init__(self, prompts: Tensor, keys: Tensor) -> None:
        super().__init__()
        self.prompts, self.keys = nn.Parameter(prompts), nn.Parameter(keys)

    def select(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest cosines of each query (B, d_q) with the keys, and whose they are: (B, count) both."""
        similarity = F.cosine_similarity(query[:, None], self.keys, dim=-1)
        values, chosen = similarity.topk(count, 1)
        return values, chosen

    def forward(self, chosen: Tensor) -> Tensor:
        """Tokens (B, count L, d) of the prompts chosen (B, count)."""
        return self.prompts[chosen].flatten(1, 2)


class L2P(Method):
    """Tokens of the ``top_k`` nearest prompts at the input; the feature is the mean of their outputs."""

    paper = "L2P 2022 (2112.08654)"
    stores = "one pool of prompts and keys, heads, class rows"
    forward_passes: ClassVar[int] = 2
    config: L2PConfig

    def __init__(
        self, backbone: Backbone, config: L2PConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        size, generator = config.pool_size, self.generator(0, "adapter")
        prompts = uniform(size, config.prompt_length, backbone.dim, generator=generator)
        keys = small(size, backbone.feature_dim, generator=generator)
        self.pool = Pool(prompts, keys).to(self.device)
        self.adapters.update({"pool": self.pool})
        self.tokens = ExtraTokens(backbone)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy on the current classes, less the mean cosine of queries with the keys they chose."""
        with self.context.autocast():
            features, similarity = self._prompted(batch.images)
        loss = self.class_loss.cross_entropy(self.heads.current(features.float()), batch.labels)
        return loss - self.config.pull * similarity.mean()

    def extract(self, images: Tensor) -> Tensor:
        """Mean output of each image's own prompts, as the final feature (n, row_dim)."""
        return self._prompted(images)[0]

    def _prompted(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, d), and the cosines of the queries with the chosen keys (B, top_k)."""
        similarity, chosen = self.pool.select(self.query(images), self.config.top_k)
        return self.tokens.feature(images, self.pool(chosen)), similarity
