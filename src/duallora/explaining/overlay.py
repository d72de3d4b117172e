"""A heat map drawn over an image."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

_LONGEST = 384  # pixels of a drawn image
_SHORTEST = 224  # smaller ones are enlarged, so that the map can be seen
_DIM = 0.35  # brightness of parts without any heat
_STOPS = np.array([[0, 0, 90], [150, 0, 120], [235, 70, 40], [255, 220, 60]], dtype=np.float64)
_STRENGTH = 0.55  # of the colour where the heat is 1


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Draws a heat map over an image: cold parts are dark, hot ones bright and yellow.

    Args:
        picture: RGB.
        heat: (rows, columns), in [0, 1].
    """
    scale = min(_LONGEST / max(picture.size), max(1.0, _SHORTEST / min(picture.size)))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    size = (width, height)
    image = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    small = Image.fromarray(heat.float().cpu().numpy())
    values = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float64).clip(0, 1)[..., None]
    places = np.linspace(0, 1, len(_STOPS))
    colour = np.stack([np.interp(values[..., 0], places, stop) for stop in _STOPS.T], -1)
    mixed = image * (_DIM + (1 - _DIM) * values)
    mixed = mixed * (1 - _STRENGTH * values) + colour * _STRENGTH * values
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
