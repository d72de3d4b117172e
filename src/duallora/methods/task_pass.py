"""What DualLoRA reads of a task's images in a pass without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duallora.adapters.moments import Moment, gather_moments
from duallora.methods.interface import Loader
from duallora.runtime import parallel

if TYPE_CHECKING:
    from duallora.methods.duallora import DualLoRA

Place = tuple[int, str]
"""Layer, and the group of its projections that share a second moment."""


@dataclass(frozen=True)
class Seen:
    """What a pass saw: moments, gate features by layer (n, m d), features (n, row_dim), labels (n,)."""

    moments: dict[Place, Moment]
    gate: dict[int, Tensor]
    features: Tensor
    labels: Tensor


@torch.no_grad()
def look(method: DualLoRA, loader: Loader, own: bool = False) -> Seen:
    """A pass without gradients over a task's images.

    Args:
        method: whose model makes the pass, as it is.
        loader: the task's images, evaluation view.
        own: leave each image out of its own row in the gate (the rows of the task exist already).
    """
    memory, adapted = method.memory, method.adapted
    attentions = {layer: method.backbone.attention(layer) for layer in adapted}
    features, labels = [], []
    gathered: dict[int, list[Tensor]] = {layer: [] for layer in memory.points}
    with gather_moments(adapted, attentions, memory.reader, method.config.moments) as moments:
        for batch in loader():
            with method.context.autocast():
                seen = method.encode(batch.images, (batch.labels, batch.indices) if own else None)
            features.append(seen.features)
            labels.append(batch.labels)
            for layer, found in gathered.items():
                found.append(seen.gate_features[layer])
    gate = {layer: parallel.gather(torch.cat(found)) for layer, found in gathered.items()}
    joined = (parallel.gather(torch.cat(parts)) for parts in (features, labels))
    return Seen(moments, gate, *joined)
