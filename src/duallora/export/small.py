"""ONNX files for small devices: int8 layers, images prepared in the graph, and what each changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from duallora.data.images import to_pil
from duallora.data.transforms import ImageLike
from duallora.errors import DualLoRAError
from duallora.export.graph import metadata, to_onnx
from duallora.export.int8 import quantised
from duallora.export.parity import Parity, answers
from duallora.export.preprocessing import with_preprocessing
from duallora.learner import ContinualLearner

MOST_IMAGES = 256
"""Images that are used at most: half to calibrate on, half to measure on."""

_SIZES = ((48, 64), (200, 133), (97, 300), (512, 384))  # of images made up where none are given


@dataclass(frozen=True)
class Measured:
    """What one change of the file does.

    Attributes:
        name: of the change.
        parity: its answers beside those before the change.
        milliseconds: an image, before and after.
        megabytes: of the file, before and after.
    """

    name: str
    parity: Parity
    milliseconds: tuple[float, float]
    megabytes: tuple[float, float]


def small_onnx(
    learner: ContinualLearner, images: Sequence[ImageLike], *, int8: bool, preprocessing: bool
) -> tuple[bytes, list[Measured]]:
    """An ONNX file in int8, with the preparation of images in the graph, or both.

    Args:
        learner: on the CPU.
        images: of the kind that will come. Every second one calibrates, the others are measured on; of more
            than `MOST_IMAGES` so many are taken, spread evenly. May be empty without int8: then images are
            made up.
        int8: quantise the linear layers of the backbone.
        preprocessing: take images as decoded (height, width, 3), uint8, RGB.

    Returns:
        The file, and what each change does to its answers.

    Raises:
        DualLoRAError: too few images, an operation that ONNX does not have, or the extra is missing.
    """
    if int8 and len(images) < 2:
        raise DualLoRAError("int8 needs at least two images to calibrate and to measure on; give more.")
    step = max(1, -(-len(images) // MOST_IMAGES))
    pictures = [to_pil(image) for image in images[::step]] or _made_up()
    views = [learner.preprocess(picture).numpy() for picture in pictures]
    calibrating, measured = (views[::2], views[1::2]) if int8 else ([], views)
    about, told = metadata(learner), []
    data = to_onnx(learner, about)
    before, time_before = answers(data, measured)
    if int8:
        about |= {"precision": "int8: linear layers of the backbone"}
        small = quantised(data, calibrating)
        after, time_after = answers(small, measured)
        times, sizes = (time_before, time_after), (len(data) / 1e6, len(small) / 1e6)
        told.append(Measured("int8", Parity.of(after, before), times, sizes))
        data, before, time_before = small, after, time_after
    if preprocessing:
        about |= {
            "input": "image: uint8 (height, width, 3), RGB, upright, of any size; a batch of one comes out"
        }
        whole = with_preprocessing(data, learner.backbone.info)
        raw = [np.asarray(picture) for picture in (pictures[1::2] if int8 else pictures)]
        after, time_after = answers(whole, raw)
        times, sizes = (time_before, time_after), (len(data) / 1e6, len(whole) / 1e6)
        told.append(Measured("preprocessing", Parity.of(after, before), times, sizes))
        data = whole
    return _described(data, about), told


def _described(data: bytes, about: dict[str, Any]) -> bytes:
    """The same file with its metadata as they are now."""
    import onnx

    model = onnx.load_model_from_string(data)
    # Whatever the quantiser kept of them.
    onnx.helper.set_model_props(
        model, {"duallora": json.dumps(about), "classes": json.dumps(about["classes"])}
    )
    described: bytes = model.SerializeToString()
    return described


def _made_up() -> list[Image.Image]:
    """Smooth images of several sizes, the same on every call."""
    made = []
    for number, (width, height) in enumerate(_SIZES * 2):
        small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        made.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return made
