"""Handwritten digits: small real images that come with scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.split import split
from duallora.streams.task import Stream

DIGITS = "digits"
DIGITS_TASKS = 5
DIGITS_PAGE = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"
DIGITS_AUGMENTATION = "crop"  # a mirrored digit is another sign

_WHITE = 16


class DigitsDataset(Dataset[tuple[Image.Image, int]]):
    """1797 handwritten digits of 8x8 pixels as RGB images, classes ``"0"`` to ``"9"``."""

    def __init__(self) -> None:
        """Reads the digits from the installed scikit-learn."""
        from sklearn.datasets import load_digits  # here, because it takes a second

        data = load_digits()
        self.classes = [str(digit) for digit in range(10)]
        self.targets = [int(target) for target in data.target]
        self._images = np.round(data.images * (255 / _WHITE)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]).convert("RGB"), self.targets[index]


def digits(
    tasks: int = DIGITS_TASKS,
    order_seed: int | Literal["alphabetical"] = 1993,
    *,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
) -> Stream:
    """Handwritten digits as a stream; every fifth image of a class is a test image.

    Args:
        tasks: number of tasks.
        order_seed: as for ``split``.
        classes: as for ``split``.
        train_per_class: as for ``split``.
        holdout: as for ``split``; 0 tests on every fifth image of a class.

    Raises:
        DualLoRAError: as for ``split``.
    """
    stream = split(
        DigitsDataset(),
        tasks,
        order_seed=order_seed,
        classes=classes,
        train_per_class=train_per_class,
        holdout=holdout,
        name=DIGITS,
    )
    return replace(stream, augmentation=DIGITS_AUGMENTATION)


def load_digits_collection(request: Request) -> Collection:
    """The digits, for the list of streams."""
    return Collection(DIGITS, (Part("", DigitsDataset(), None),), DIGITS_AUGMENTATION)


DIGITS_ENTRY = StreamEntry(
    name=DIGITS,
    summary="8 x 8 handwritten digits",
    classes="10",
    images="1,797 in all",
    size="nothing",
    licence=UNSURE,
    load=load_digits_collection,
    tasks=DIGITS_TASKS,
    page=DIGITS_PAGE,
    notes=(
        "The images come with scikit-learn: nothing is to be fetched.",
        "Every fifth image of a class is a test image.",
    ),
)
