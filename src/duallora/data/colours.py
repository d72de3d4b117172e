"""Brightness, contrast, saturation and hue of training views, drawn at random, keyed as crops are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from duallora.data.transforms import Augmentation

LARGEST_CHANGE = 0.4
"""Of brightness, contrast and saturation: the factors lie in 1 - 0.4 to 1 + 0.4."""

LARGEST_TURN = 0.05
"""Of the hue to either side, as a share of the colour circle."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Colours:
    """Gives views that are cropped already other colours.

    Every draw is keyed by (seed, task, epoch, sample index): neither the batch, nor the process, nor any
    global generator has a part in the result.

    Attributes:
        augmentation: makes the crops; knows seed, task and how views are normalised.
    """

    augmentation: Augmentation

    def __call__(self, images: Tensor, positions: Sequence[int], epoch: int | None) -> Tensor:
        """The views in other colours.

        Args:
            images: normalised (n, 3, H, W).
            positions: of the samples in their data set, n of them.
            epoch: in which they are seen; None leaves them as they are.

        Returns:
            Normalised views (n, 3, H, W), no value outside what a pixel can be.
        """
        if epoch is None:
            return images
        info = self.augmentation.info
        drawn = [self.factors(epoch, index) for index in positions]
        numbers = torch.tensor([(*info.mean, 0.0), (*info.std, 0.0), *drawn])
        if images.is_cuda:  # sent together and from pinned memory: the GPU is not waited for
            numbers = numbers.pin_memory().to(images.device, non_blocking=True)
        mean, std = numbers[:2, :3, None, None]
        brightness, contrast, saturation, turn = numbers[2:, :, None, None, None].unbind(1)
        pixels = ((images * std + mean) * brightness).clamp(0, 1)
        pixels = torch.lerp(_grey(pixels).mean((2, 3), keepdim=True), pixels, contrast).clamp(0, 1)
        pixels = torch.lerp(_grey(pixels), pixels, saturation).clamp(0, 1)
        pixels = _turned(pixels, turn).clamp(0, 1)
        normalised: Tensor = (pixels - mean) / std
        return normalised.contiguous()  # as views without a change are: a compiler would notice

    def factors(self, epoch: int, index: int) -> tuple[float, float, float, float]:
        """Of brightness, contrast and saturation for one sample in one epoch, and the hue's angle."""
        key = f"{self.augmentation.seed:d}/{self.augmentation.task:d}/{epoch:d}/{index:d}/colours"
        random = Random(key)
        brightness, contrast, saturation = (1 + LARGEST_CHANGE * random.uniform(-1, 1) for _ in range(3))
        return brightness, contrast, saturation, 2 * math.pi * LARGEST_TURN * random.uniform(-1, 1)


def _grey(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, 1, H, W)."""
    red, green, blue = pixels.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def _turned(pixels: Tensor, angle: Tensor) -> Tensor:
    """Pixels (n, 3, H, W) turned about the axis of greys by angles (n, 1, 1, 1), in radians."""
    red, green, blue = pixels.unbind(1)
    across = torch.stack([blue - green, red - blue, green - red], 1) / 3**0.5
    middle = pixels.mean(1, keepdim=True)
    return middle + (pixels - middle) * angle.cos() + across * angle.sin()
