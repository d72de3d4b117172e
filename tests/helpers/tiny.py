"""Tiny random backbones of every supported family: real timm classes, no download, the same on every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from timm.layers import QuickGELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from duallora.backbones.backbone import Backbone, BackboneInfo, state_sha256

WIDTH, IMAGE = 32, 32

_SIZE = {"img_size": IMAGE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 5}

FAMILIES: Mapping[str, Callable[..., nn.Module]] = {
    "vit": partial(VisionTransformer, **_SIZE),
    "deit_distilled": partial(VisionTransformerDistilled, **_SIZE),
    "dinov2_registers": partial(
        VisionTransformer, reg_tokens=4, no_embed_class=True, init_values=0.5, **_SIZE
    ),
    "clip": partial(
        VisionTransformer,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=QuickGELU,
        **_SIZE,
    ),
    "siglip": partial(VisionTransformer, **_SIZE, class_token=False, global_pool="map"),
}


def tiny_model(family: str = "vit", seed: int = 0, **changes: object) -> nn.Module:
    """A timm model of 2 layers and d = 32 with its classifier, on 32 x 32 images.

    The usual initialisation is so small that attention is uniform and tokens hardly differ; larger weights
    make every projection matter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family](**changes)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ls" not in name:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_backbone(family: str = "vit", seed: int = 0, **changes: object) -> Backbone:
    """The same as a frozen backbone; 4 x 4 patch tokens, mean and std 0.5."""
    model = tiny_model(family, seed, **changes)
    half = (0.5, 0.5, 0.5)
    info = BackboneInfo(f"tiny-{family}", state_sha256(model), half, half, (3, IMAGE, IMAGE), "bicubic", 1.0)
    return Backbone(model, info)


def tiny_images(count: int = 3, seed: int = 0) -> torch.Tensor:
    """Random normalised images (count, 3, 32, 32)."""
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))
