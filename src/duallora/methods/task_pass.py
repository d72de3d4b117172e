"""What DualLoRA reads of a task's images in a pass without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duallora.adapters.dual_lora import AdaptedQKV
from duallora.adapters.dynamic_memory import DynamicMemory
from duallora.adapters.moments import Moment, gather_moments
from duallora.backbones.backbone import Backbone
from duallora.methods.interface import Batch, Encoding, Loader
from duallora.runtime import parallel

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
def look(
    loader: Loader,
    encode: Callable[[Batch], Encoding],
    memory: DynamicMemory,
    adapted: Mapping[int, AdaptedQKV],
    backbone: Backbone,
    kind: str,
) -> Seen:
    """A pass without gradients over a task's images.

    Args:
        loader: the task's images, evaluation view.
        encode: makes the pass over a batch.
        memory: its gate reads.
        adapted: the adapted projections by layer.
        backbone: what they are in.
        kind: of the moments, field ``moments``.
    """
    attentions = {layer: backbone.attention(layer) for layer in adapted}
    features, labels = [], []
    gathered: dict[int, list[Tensor]] = {layer: [] for layer in memory.points}
    with gather_moments(adapted, attentions, memory.reader, kind) as moments:
        for batch in loader():
            seen = encode(batch)
            features.append(seen.features)
            labels.append(batch.labels)
            for layer, found in gathered.items():
                found.append(seen.gate_features[layer])
    gate = {layer: parallel.gather(torch.cat(found)) for layer, found in gathered.items()}
    joined = (parallel.gather(torch.cat(parts)) for parts in (features, labels))
    return Seen(moments, gate, *joined)
