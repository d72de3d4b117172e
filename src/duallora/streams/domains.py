"""The same images in several visual domains, one task a domain."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from duallora.data.images import to_pil
from duallora.errors import DualLoRAError
from duallora.streams.task import Change, Picture, Stream, Task, concatenated

_MOSAIC = (16, 16)
_POSTERISED_BITS = 2
_HUE_TURN = 85  # of 256: a third of the colour circle


def with_domains(stream: Stream, domains: Sequence[str]) -> Stream:
    """Shows all images of a stream in one domain after another.

    Args:
        stream: its tasks are merged into one.
        domains: names out of ``DOMAINS``, one task each, in this order.

    Returns:
        A stream whose tasks are named by their domain and have all classes each.

    Raises:
        DualLoRAError: a domain is unknown or comes twice, or none is given.
    """
    if not domains:
        raise DualLoRAError(f"no domain is given: choose from {', '.join(DOMAINS)}")
    for domain in domains:
        if domain not in DOMAINS:
            near = difflib.get_close_matches(domain, DOMAINS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DualLoRAError(f"unknown domain {domain!r}{hint}: choose from {', '.join(DOMAINS)}")
    if len(set(domains)) < len(domains):
        raise DualLoRAError(f"a domain comes twice in {', '.join(domains)}: every task needs its own")
    train = [task.train for task in stream]
    test = [task.test for task in stream]
    tasks = [
        Task(d, *(concatenated(part, stream.class_order, DOMAINS[d]) for part in (train, test)))
        for d in domains
    ]
    return replace(stream, name=f"{stream.name} ({', '.join(domains)})", tasks=tuple(tasks))


def photo(image: Picture) -> Image.Image:
    """The image as it is."""
    return to_pil(image)


def edges(image: Picture) -> Image.Image:
    """Strength of the edges of the grey image (Sobel), white on black."""
    grey = np.pad(np.asarray(to_pil(image).convert("L"), dtype=np.float32), 1, mode="edge")
    smooth_rows = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    smooth_columns = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    across = smooth_rows[:, 2:] - smooth_rows[:, :-2]
    down = smooth_columns[2:] - smooth_columns[:-2]
    strength = np.sqrt(across * across + down * down).clip(0, 255).astype(np.uint8)
    return Image.fromarray(strength).convert("RGB")


def negative(image: Picture) -> Image.Image:
    """Every value turned round."""
    return ImageOps.invert(to_pil(image))


def pixelated(image: Picture) -> Image.Image:
    """A mosaic of 16 x 16 squares."""
    picture = to_pil(image)
    mosaic = picture.resize(_MOSAIC, Image.Resampling.BOX)
    return mosaic.resize(picture.size, Image.Resampling.NEAREST)


def posterised(image: Picture) -> Image.Image:
    """Four levels a channel, and the hue turned by a third of the circle."""
    hue, saturation, value = to_pil(image).convert("HSV").split()
    turned = hue.point([(level + _HUE_TURN) % 256 for level in range(256)])
    return ImageOps.posterize(
        Image.merge("HSV", (turned, saturation, value)).convert("RGB"), _POSTERISED_BITS
    )


DOMAINS: dict[str, Change] = {
    "photo": photo,
    "edges": edges,
    "negative": negative,
    "pixelated": pixelated,
    "posterised": posterised,
}
"""The domains by name; each turns an image into an ``RGB`` image of the same size."""
