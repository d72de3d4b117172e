"""What :mod:`pretrain_backbone` makes: the recipe, its schedule, the model and the file of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.layers import HybridEmbed  # type: ignore[attr-defined]
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from duallora.errors import DualLoRAError
from duallora.storage.atomic import write_atomic

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WARM_UP = 0.05  # share of the steps
STRIDE = 8  # pixels a token, each way


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the images.

    Attributes:
        depth: number of blocks.
        width: of the tokens; the stem's channels are 1/6, 1/3, 2/3 and all of it.
        heads: attention heads a block.
        images: training images in each part of the schedule, separated by commas.
        sizes: image side in pixels in each part; the last is what the model is built for.
        batch: images a step.
        learning_rate: its peak.
        weight_decay: on matrices and convolution kernels only.
        label_smoothing: share of the target spread over all classes.
        cutmix: share of the batches that are mixed; none in the last 15 % of the steps.
        drop_path: in the last block; it grows linearly from zero in the first.
        ema: decay per step of the exponential average that is saved as the weights.
        seed: of weights, order and draws.
    """

    depth: int = 6
    width: int = 192
    heads: int = 3
    images: tuple[int, ...] = (1_020_000, 500_000)
    sizes: tuple[int, ...] = (48, 64)
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    cutmix: float = 0.25
    drop_path: float = 0.05
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.depth, self.heads, self.batch, self.learning_rate, *self.images, *self.sizes) <= 0:
            raise DualLoRAError("depth, heads, batch, learning rate, images and sizes have to be above zero.")
        if len(self.images) != len(self.sizes):
            raise DualLoRAError("--images and --sizes need one number for each part of the schedule.")
        if self.side < max(self.sizes) or any(size % STRIDE for size in self.sizes):
            raise DualLoRAError(f"--sizes have to be multiples of {STRIDE}, the last one the largest.")
        if self.width < 6 or self.width % self.heads:
            raise DualLoRAError("--width has to be 6 or more and a multiple of --heads.")
        if not all(0 <= share < 1 for share in (self.label_smoothing, self.drop_path, self.ema)):
            raise DualLoRAError("--label-smoothing, --drop-path and --ema have to be 0 or more and below 1.")
        if not 0 <= self.cutmix <= 1 or self.weight_decay < 0:
            raise DualLoRAError("--cutmix has to lie in [0, 1], and --weight-decay cannot be negative.")

    @property
    def side(self) -> int:
        """Image side that the model is built for."""
        return self.sizes[-1]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the stem's convolutions."""
        return self.width // 6, self.width // 3, 2 * self.width // 3, self.width

    @property
    def steps(self) -> int:
        """In the whole schedule."""
        return sum(self._parts)

    @property
    def _parts(self) -> list[int]:
        return [max(1, round(images / self.batch)) for images in self.images]

    def size_at(self, step: int) -> int:
        """Image side of a step."""
        for size, steps in zip(self.sizes, self._parts, strict=True):
            if step < steps:
                return size
            step -= steps
        return self.side

    def rate_at(self, step: int) -> float:
        """Learning rate: a linear warm-up, then one cosine to zero."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / (self.steps - warm_up)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


def build(recipe: Recipe, classes: int) -> VisionTransformer:
    """The embedded architecture with a head; smaller images get resampled position embeddings."""
    stem = ConvStem(depth=4, channels=recipe.channels, stride=(2, 2, 1, 2), act_layer=nn.GELU)
    stem.num_features = recipe.width  # type: ignore[assignment]  # HybridEmbed reads the stem's width there
    grid = recipe.side // STRIDE
    return VisionTransformer(
        img_size=recipe.side,
        patch_size=1,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        num_classes=classes,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False, feature_size=(grid, grid)),
        drop_path_rate=recipe.drop_path,
        dynamic_img_size=True,
    )


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices and kernels; none on biases, norms, position embedding and class token."""
    exempt = model.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0} for decays, group in groups.items()
    ]


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are distributed: fp16, but for the batch norm's, whose variances need the range."""
    return {
        name: tensor.half() if tensor.is_floating_point() and ".bn." not in name else tensor
        for name, tensor in weights.items()
    }


def write_backbone(path: Path, weights: Mapping[str, Tensor], recipe: Recipe, classes: Sequence[str]) -> None:
    """Writes weights in timm's keys, with the metadata that ``embedded`` needs."""
    grid = recipe.side // STRIDE
    architecture = (
        f"timm VisionTransformer(img_size={recipe.side}, patch_size=1, embed_dim={recipe.width}, "
        f"depth={recipe.depth}, num_heads={recipe.heads}, num_classes={len(classes)}, embed_layer=partial("
        f"HybridEmbed, backbone=stem, proj=False, feature_size=({grid}, {grid}))); stem = timm ConvStem("
        f"depth=4, channels={recipe.channels}, stride=(2, 2, 1, 2), kernel_size=3, act_layer=GELU), "
        f"stem.num_features = {recipe.width}"
    )
    metadata = {
        "architecture": architecture,
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "head_classes": ",".join(classes),
    }
    write_atomic(path, in_order(save(dict(weights), metadata)))


def in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: as saved, their order changes the sha256 from call to call."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
