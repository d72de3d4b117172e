"""Classifiers by the angle between a feature and a weight per row, and the losses they are trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora.classifiers.heads import Heads


def cosines(f: Tensor, weight: Tensor) -> Tensor:
    """Cosines (n, R) between features (n, d) and weights (R, d)."""
    return F.normalize(f) @ F.normalize(weight).T


def head_cosines(heads: Heads, f: Tensor) -> Tensor:
    """Cosines (n, R) between features and the weights of all heads; biases have no part.

    Args:
        heads: of the tasks, side by side.
        f: whose first ``heads.dim`` columns are the final feature.
    """
    return cosines(f[:, : heads.dim], torch.cat([head.get_parameter("weight") for head in heads.tasks]))


def current_cosines(heads: Heads, f: Tensor) -> Tensor:
    """Cosines (n, |Y_t|) between features and the weights of the latest head; its bias has no part.

    Args:
        heads: of the tasks, side by side.
        f: whose first ``heads.dim`` columns are the final feature.
    """
    return cosines(f[:, : heads.dim], heads.tasks[-1].get_parameter("weight"))


def cosface_logits(cosine: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Logits (n, k): ``scale (cos - margin)`` at the right class and ``scale cos`` at the others.

    "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (CVPR 2018, arXiv 1801.09414).

    Args:
        cosine: (n, k).
        labels: the right ones (n,).
        scale: multiplies the cosines.
        margin: by how much the right one has to lead.
    """
    return scale * (cosine - margin * F.one_hot(labels, cosine.shape[1]))
