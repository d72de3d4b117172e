"""An example to begin with: drawn rings, stars and triangles, made on the spot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

CLASSES = ("ring", "star", "triangle")
LESSON = "example shapes"
EACH = 15
"""Images of a class that are taught, held-back ones among them."""

_EDGE = 128  # pixels of an image
_FINE = 4  # drawn so many times larger, then made smaller: smooth edges


def drawn(name: str, seed: int) -> Image.Image:
    """One shape of any colour, size and place on a pale ground, (128, 128) RGB.

    Args:
        name: of ``CLASSES``.
        seed: the same one draws the same picture.
    """
    chance = Random(f"{name} {seed}")
    edge = _EDGE * _FINE
    image = Image.new("RGB", (edge, edge), _colour(chance, 215, 250))
    radius = edge * chance.uniform(0.28, 0.4)
    x, y = (edge / 2 + chance.uniform(-1, 1) * (edge / 2 - radius) * 0.8 for _ in range(2))
    draw, colour = ImageDraw.Draw(image), _colour(chance, 20, 170)
    if name == "ring":
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=colour, width=round(0.3 * radius)
        )
    else:
        # Triangles stand nearly upright, stars turn as they like.
        turn = chance.uniform(-0.3, 0.3) if name == "triangle" else chance.uniform(-math.pi, math.pi)
        draw.polygon(list(_corners(name, x, y, radius, turn - math.pi / 2)), fill=colour)
    return image.reduce(_FINE)


def write(folder: Path) -> Path:
    """Writes the images to be taught, a folder for each class; gives the folder."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for seed in range(EACH):
            drawn(name, seed).save(folder / name / f"{name}-{seed:02d}.png")
    return folder


def _corners(name: str, x: float, y: float, radius: float, turn: float) -> Iterator[tuple[float, float]]:
    reach = (1.0, 0.42) * 5 if name == "star" else (1.0, 1.0, 1.0)
    for place, share in enumerate(reach):
        angle = turn + 2 * math.pi * place / len(reach)
        yield x + share * radius * math.cos(angle), y + share * radius * math.sin(angle)


def _colour(chance: Random, low: int, high: int) -> tuple[int, int, int]:
    return chance.randint(low, high), chance.randint(low, high), chance.randint(low, high)
