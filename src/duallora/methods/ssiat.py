"""SSIAT: one adapter tuned through all tasks; prototypes of old classes follow the shift of the features.

"Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer" (CVPR 2024, arXiv 2403.19979).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duallora.adapters.bottleneck import Bottleneck
from duallora.backbones.backbone import Backbone
from duallora.classifiers.alignment import Gaussians
from duallora.classifiers.cosine import cosface_logits, current_cosines, head_cosines
from duallora.methods.base import Method
from duallora.methods.config import BottleneckFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.methods.shifted_prototypes import ShiftFields, settle


@dataclass(frozen=True)
class SSIATConfig(ShiftFields, BottleneckFields, MethodConfig):
    """Fields of SSIAT: those of the bottleneck, and of cosine heads on shifted prototypes."""


class SSIAT(Method):
    """A bottleneck beside every mlp, trained in every task; ``logit_c = scale cos(f, w_c)``."""

    paper = "SSIAT: Tan et al. 2024 (2403.19979)"
    stores = "one bottleneck a layer, heads, a mean and covariance per class"
    config: SSIATConfig

    def __init__(
        self, backbone: Backbone, config: SSIATConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        generator = self.generator(0, "adapter")
        self.attach_mlp(
            config.first_adapted_layer, lambda dim: Bottleneck(dim, config.rank, config.scale, generator)
        )
        self.gaussians = Gaussians(backbone.feature_dim, heads=False)
        self.keep_by_row("gaussians", self.gaussians)
        self._start: Tensor | None = None  # features of the task's images before it is trained

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Keeps what the model before the task makes of its images, until the task's end."""
        moves = task.index > 0 and len(task.classes) > 1  # a single class is not trained: nothing will shift
        if moves and self.config.shift:
            self._start = self.observe(loader)[0]
        super().prepare(task, loader)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight of the head, which has no bias, and the adapter."""
        head, *rest = super().parameter_groups()
        return [{**head, "params": [self.heads.tasks[-1].get_parameter("weight")]}, *rest]

    def loss(self, batch: Batch) -> Tensor:
        """CosFace over the classes of the current task."""
        cosine = self.current_logits(batch.images)
        logits = cosface_logits(cosine, batch.labels, self.config.cosine_scale, self.config.margin)
        return self.class_loss.cross_entropy(logits, batch.labels)

    def current_logits(self, images: Tensor) -> Tensor:
        """Cosines (n, |Y_t|) with the weights of the current head."""
        return current_cosines(self.heads, self.features(images))

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Scaled cosines to all rows (n, R)."""
        return self.config.cosine_scale * head_cosines(self.heads, encoding.features)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: rows of earlier tasks are moved, the task's are added, then all heads are aligned."""
        settle(self, self.config, self.gaussians, task, loader, self._start)
        self._start = None
