"""From an image to the backbone's input: the evaluation transform and the keyed augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from duallora.data.images import to_pil
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.backbones.backbone import BackboneInfo

ImageLike = Image.Image | torch.Tensor | str | Path
Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels, as Pillow has it."""

CROP_SHARE = 0.6
"""Smallest share of the image's area that a random crop keeps, where the policy names none."""

CROP_RATIO: tuple[float, float] = (3 / 4, 4 / 3)
"""Smallest and largest ratio of width to height of a random crop."""

_CROP_ATTEMPTS = 10
_LONGEST_STRIP = 64  # times the input; a longer resized image is not made whole
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def evaluation_transform(info: BackboneInfo) -> EvaluationTransform:
    """The transform the backbone was evaluated with: resize, centre crop, normalise.

    The shorter side is resized to ``floor(size / crop_pct)``, as timm does.

    Args:
        info: input size, mean, standard deviation, interpolation and crop share of the backbone.

    Returns:
        A picklable function from an image to a float32 tensor of shape (3, height, width).

    Raises:
        DualLoRAError: the backbone's interpolation is unknown.
    """
    return EvaluationTransform(info)


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and flip, every draw keyed by (seed, task, epoch, sample index).

    Neither the worker, nor the order of the samples, nor any global generator has a part in the result.

    Attributes:
        info: the backbone's preprocessing.
        policy: parts joined by a comma: ``"crop"`` keeps at least `CROP_SHARE` of the image, ``"crop=SHARE"``
            at least that share, ``"flip"`` mirrors every second one; ``"none"`` is the evaluation transform.
        seed: the run's seed.
        task: the number of the task, from 0.

    Raises:
        DualLoRAError: the policy or the backbone's interpolation is unknown.
    """

    info: BackboneInfo
    policy: str = "crop,flip"
    seed: int = 0
    task: int = 0
    _evaluation: EvaluationTransform = field(init=False, repr=False, compare=False)
    _smallest: float | None = field(init=False, repr=False, compare=False)
    _flip: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        smallest, flip = _parts(self.policy)
        object.__setattr__(self, "_smallest", smallest)
        object.__setattr__(self, "_flip", flip)
        object.__setattr__(self, "_evaluation", EvaluationTransform(self.info))

    def __call__(self, image: ImageLike, epoch: int, index: int) -> torch.Tensor:
        """Gives the view of one sample in one epoch: float32, (3, height, width)."""
        return self._evaluation.tensor(self.pixels(image, epoch, index))

    def pixels(self, image: ImageLike, epoch: int, index: int) -> Pixels:
        """The same view before normalisation: (height, width, 3)."""
        if self.policy == "none":
            return self._evaluation.pixels(image)
        picture = to_pil(image)
        # Seeding with text goes through a hash of it: neighbouring keys give unrelated draws.
        random = Random(f"{self.seed:d}/{self.task:d}/{epoch:d}/{index:d}")
        box = None
        if self._smallest is not None:
            box = _random_box(picture.width, picture.height, self._smallest, random)
        mirror = self._flip and random.random() < 0.5
        if box is None:
            return self._evaluation.pixels(ImageOps.mirror(picture) if mirror else picture)
        return self._evaluation.cut(picture, box, mirror=mirror)


def _parts(policy: str) -> tuple[float | None, bool]:
    """The smallest share that a crop keeps (None: no crop), and whether images are mirrored.

    Raises:
        DualLoRAError: an unknown part, or one that comes twice.
    """
    parts = policy.split(",")
    crops = [part for part in parts if part == "crop" or part.startswith("crop=")]
    others = [part for part in parts if part not in crops]
    try:
        shares = [float(part.removeprefix("crop=")) if part != "crop" else CROP_SHARE for part in crops]
    except ValueError:
        shares = [0.0]
    sound = len(crops) < 2 and all(0 < share <= 1 for share in shares)
    if policy != "none" and not (sound and others in ([], ["flip"])):
        raise DualLoRAError(
            f"unknown augmentation {policy!r}: give crop, crop=SHARE with a share in (0, 1], or flip, or one "
            "of the first two and flip joined by a comma, or none"
        )
    return (shares[0] if shares else None), "flip" in others


class EvaluationTransform:
    """Evaluation transform; a class because workers that are started afresh have to unpickle it."""

    def __init__(self, info: BackboneInfo) -> None:
        if info.interpolation not in _RESAMPLING:
            valid = ", ".join(_RESAMPLING)
            raise DualLoRAError(
                f"unknown interpolation {info.interpolation!r} of the backbone: valid are {valid}"
            )
        if info.crop_mode not in ("center", "squash"):
            raise DualLoRAError(
                f"unknown crop mode {info.crop_mode!r} of the backbone: valid are center, squash"
            )
        self.squash = info.crop_mode == "squash"
        self.resampling = _RESAMPLING[info.interpolation]
        self.height, self.width = info.input_size[1:]
        self.scaled_height = max(self.height, math.floor(self.height / info.crop_pct))
        self.scaled_width = max(self.width, math.floor(self.width / info.crop_pct))
        deviation = np.asarray(info.std, dtype=np.float64)
        # Bytes to normalised values in one multiplication and one addition.
        self.scale = (1 / (255 * deviation)).astype(np.float32)
        self.shift = (-np.asarray(info.mean) / deviation).astype(np.float32)

    def __call__(self, image: ImageLike) -> torch.Tensor:
        """Gives the view of an image: float32, (3, height, width)."""
        return self.tensor(self.pixels(image))

    def pixels(self, image: ImageLike) -> Pixels:
        """The view before normalisation: (height, width, 3)."""
        picture = to_pil(image)
        width, height = picture.size
        size, left, upper = self._placed(width, height)
        if max(size) > _LONGEST_STRIP * max(self.scaled_width, self.scaled_height):
            # Only the part that the crop keeps: the same pixels up to rounding, without the memory of all.
            kept = picture.resize((self.width, self.height), self.resampling, box=self.seen(width, height))
            return np.asarray(kept)
        if size != picture.size:
            picture = picture.resize(size, self.resampling)
        if size != (self.width, self.height):
            picture = picture.crop((left, upper, left + self.width, upper + self.height))
        return np.asarray(picture)

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image that the view shows: left, upper, right and lower edge in pixels."""
        size, left, upper = self._placed(width, height)
        across, down = width / size[0], height / size[1]
        right, lower = min((left + self.width) * across, width), min((upper + self.height) * down, height)
        return left * across, upper * down, right, lower

    def _placed(self, width: int, height: int) -> tuple[tuple[int, int], int, int]:
        """Size of the resized image, and where the crop begins in it."""
        if self.squash:
            size = (self.scaled_width, self.scaled_height)
        elif width * self.scaled_height >= height * self.scaled_width:
            size = (int(self.scaled_height * width / height), self.scaled_height)
        else:
            size = (self.scaled_width, int(self.scaled_width * height / width))
        return size, round((size[0] - self.width) / 2), round((size[1] - self.height) / 2)

    def cut(self, picture: Image.Image, box: Box, *, mirror: bool) -> Pixels:
        """Resizes a part of an image to the input size: (height, width, 3)."""
        pixels = np.asarray(picture.resize((self.width, self.height), self.resampling, box=box))
        return pixels[:, ::-1] if mirror else pixels

    def tensor(self, pixels: Pixels) -> torch.Tensor:
        """Normalised values, float32 (3, height, width), of a view (height, width, 3)."""
        return self.normalized(torch.from_numpy(np.array(pixels)[None]))[0]

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised values, float32 (n, 3, height, width), of views (n, height, width, 3), uint8."""
        if pixels.device.type == "cpu":
            # In one thread: those of torch would wait for each other where others have the cores.
            array = pixels.numpy().transpose(0, 3, 1, 2).astype(np.float32, order="C")
            for channel, (scale, shift) in enumerate(zip(self.scale, self.shift, strict=True)):
                array[:, channel] *= scale
                array[:, channel] += shift
            return torch.from_numpy(array)
        values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # Numbers, not tensors of them: those would be sent to the GPU, which had to be waited for.
        for channel, (scale, shift) in enumerate(zip(self.scale, self.shift, strict=True)):
            values[:, channel].mul_(float(scale)).add_(float(shift))
        return values


def _random_box(width: int, height: int, share: float, random: Random) -> Box:
    smallest, largest = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * (share + (1.0 - share) * random.random())
        ratio = math.exp(smallest + (largest - smallest) * random.random())
        cut_width, cut_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cut_width <= width and 0 < cut_height <= height:
            left = math.floor((width - cut_width + 1) * random.random())
            upper = math.floor((height - cut_height + 1) * random.random())
            return left, upper, left + cut_width, upper + cut_height
    return _middle_box(width, height)


def _middle_box(width: int, height: int) -> Box:
    """The largest box in the middle whose ratio is allowed: for images too narrow for a random one."""
    cut_width = min(width, max(1, round(height * CROP_RATIO[1])))
    cut_height = min(height, max(1, round(width / CROP_RATIO[0])))
    left, upper = (width - cut_width) // 2, (height - cut_height) // 2
    return left, upper, left + cut_width, upper + cut_height
