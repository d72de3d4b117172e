"""The images of :mod:`pretrain_backbone`: reading, order, augmentation and targets.

Generators are keyed by the seed and by what they are for, so that no image depends on the draws for another.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from duallora.errors import DualLoRAError
from duallora.runtime.progress import Progress
from duallora.streams.folder import FolderDataset
from pretrain_recipe import MEAN, STD, Recipe

GREY = (0.299, 0.587, 0.114)
CROP_SCALE = (0.35, 1.0)
CROP_RATIO = 4 / 3  # of the longer side to the shorter one, at most
COLOUR = (0.7, 1.3)  # factors of saturation and of brightness


def open_data(folder: Path) -> tuple[FolderDataset, FolderDataset]:
    """Training and validation images.

    Raises:
        DualLoRAError: a folder is missing or has no images, or they differ in their classes.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DualLoRAError(
                f"{folder} has no folder {part}/; DATA holds train/ and val/ with the classes."
            )
    training, validation = FolderDataset(folder / "train"), FolderDataset(folder / "val")
    if training.classes != validation.classes:
        raise DualLoRAError(f"train/ and val/ in {folder} hold different classes; give both the same.")
    return training, validation


def decode(data: FolderDataset, side: int, progress: Progress, label: str) -> tuple[Tensor, Tensor]:
    """All images as bytes (N, 3, side, side), resized and cut to the middle where they differ, and labels."""
    pixels = torch.empty(len(data), 3, side, side, dtype=torch.uint8)
    for place in progress.track(range(len(data)), len(data), label):
        image, _ = data[place]
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        pixels[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels, torch.tensor(data.targets)


def keyed(*key: object) -> Random:
    """A generator for one purpose; text is hashed, so that neighbouring keys give unrelated draws."""
    return Random("/".join(map(str, key)))


def samples(recipe: Recipe, step: int, count: int) -> list[tuple[int, int]]:
    """Epoch and index of each image of a step: every epoch shows all images once, in its own order."""
    places = range(step * recipe.batch, (step + 1) * recipe.batch)
    orders = {}
    for epoch in {place // count for place in places}:
        generator = torch.Generator().manual_seed(keyed(recipe.seed, "order", epoch).getrandbits(63))
        orders[epoch] = torch.randperm(count, generator=generator)
    return [(place // count, int(orders[place // count][place % count])) for place in places]


def view_draws(seed: int, epoch: int, index: int) -> tuple[float, ...]:
    """Left, top, width, height of a crop in [0, 1]; -1 to mirror it, else 1; saturation; brightness."""
    random = keyed(seed, "view", epoch, index)
    width = height = 1.0
    for _ in range(10):
        area, skew = random.uniform(*CROP_SCALE), CROP_RATIO ** random.uniform(-1, 1)
        if max(area * skew, area / skew) <= 1:
            width, height = math.sqrt(area * skew), math.sqrt(area / skew)
            break
    left, top = random.random() * (1 - width), random.random() * (1 - height)
    mirror = random.choice((-1.0, 1.0))
    return left, top, width, height, mirror, random.uniform(*COLOUR), random.uniform(*COLOUR)


def views(pixels: Tensor, draws: Tensor, size: int) -> Tensor:
    """Crops, mirrors and recolours a batch where it lies: (B, 3, H, W) bytes -> (B, 3, size, size)."""
    left, top, width, height, mirror, saturation, brightness = draws.unbind(1)
    none = torch.zeros_like(left)
    # Output coordinates in [-1, 1] to those of the input.
    across = torch.stack([mirror * width, none, 2 * left + width - 1], 1)
    down = torch.stack([none, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [len(pixels), 3, size, size], align_corners=False)
    cut = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    grey = (cut * cut.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
    coloured = (grey + saturation.view(-1, 1, 1, 1) * (cut - grey)) * brightness.view(-1, 1, 1, 1)
    return normalised(coloured.clamp(0, 1))


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] as the model gets them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def cutmix(images: Tensor, random: Random) -> tuple[Tensor, float]:
    """Pastes one random box of each image's predecessor in the batch; also the share that is left."""
    side = images.shape[-1]
    half = side * math.sqrt(1 - random.random()) / 2
    centres = [side * random.random() for _ in range(2)]
    (top, bottom), (left, right) = (
        (max(0, round(centre - half)), min(side, round(centre + half))) for centre in centres
    )
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / side**2


def soft_targets(labels: Tensor, classes: int, smoothing: float, share: float = 1.0) -> Tensor:
    """Smoothed targets (B, classes) of a batch of which ``share`` was left by :func:`cutmix`."""
    hot = F.one_hot(labels, classes).float()
    mixed = share * hot + (1 - share) * hot.roll(1, 0)
    return (1 - smoothing) * mixed + smoothing / classes
