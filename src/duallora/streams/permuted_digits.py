"""Digits under fixed permutations of their pixels: a stream of as many tasks as are wanted."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.digits import DIGITS_PAGE, DigitsDataset

PERMUTED_DIGITS = "permuted-digits"
PERMUTED_DIGITS_TASKS = 50
PERMUTED_DIGITS_AUGMENTATION = "none"  # a crop would move the pixels that the permutation fixes

_DIGITS = 10
_CLASSES_PER_TASK = 2


class PermutedDigitsDataset(Dataset[tuple[Image.Image, int]]):
    """The digits under permutations of their 64 pixels; a class is a digit under one permutation.

    Permutation p is ``numpy.random.RandomState(p).permutation(64)``: pixel i of an image is pixel
    ``permutation[i]`` of the digit, counted row by row. The class of digit 7 under permutation 3 is
    ``"p03-7"``.

    Attributes:
        classes: names, sorted; the last permutation may have its first digits only.
        targets: index into ``classes`` per image.
        identifiers: the permutation and the number of the digit, such as ``"p03/17"``.
    """

    def __init__(self, classes: int) -> None:
        """Permutes the digits that come with scikit-learn.

        Args:
            classes: how many; ten a permutation.

        Raises:
            DualLoRAError: it is below 1.
        """
        if classes < 1:
            raise DualLoRAError(f"classes must be at least 1, not {classes}")
        digits = DigitsDataset()
        number = -(-classes // _DIGITS)
        width = max(2, len(str(number - 1)))
        self.classes = [f"p{c // _DIGITS:0{width}d}-{c % _DIGITS}" for c in range(classes)]
        self.targets: list[int] = []
        self.identifiers: list[str] = []
        self._digits: list[int] = []
        for p in range(number):
            for i, digit in enumerate(digits.targets):
                if p * _DIGITS + digit < classes:
                    self.targets.append(p * _DIGITS + digit)
                    self.identifiers.append(f"p{p:0{width}d}/{i}")
                    self._digits.append(i)
        self._pixels = np.stack([np.asarray(digits[i][0].convert("L")).ravel() for i in range(len(digits))])
        self._side = digits[0][0].width
        self._permutations = [
            np.random.RandomState(p).permutation(self._pixels.shape[1]) for p in range(number)
        ]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = self.targets[index]
        pixels = self._pixels[self._digits[index]][self._permutations[target // _DIGITS]]
        return Image.fromarray(pixels.reshape(self._side, self._side)).convert("RGB"), target


def load_permuted_digits(request: Request) -> Collection:
    """Makes as many classes as the tasks need: two each, where their sizes are not given."""
    tasks, first = request.tasks, request.first_classes
    if request.classes is not None:
        classes = request.classes
    elif not isinstance(tasks, int):
        classes = sum(tasks)
    elif first is not None:
        classes = first + _CLASSES_PER_TASK * (tasks - 1)
    else:
        classes = _CLASSES_PER_TASK * tasks
    return Collection(
        PERMUTED_DIGITS,
        (Part("", PermutedDigitsDataset(max(1, classes)), None),),
        PERMUTED_DIGITS_AUGMENTATION,
        group=_permutation,
    )


def _permutation(name: str) -> str:
    return name.partition("-")[0]


PERMUTED_DIGITS_ENTRY = StreamEntry(
    name=PERMUTED_DIGITS,
    summary="the digits under fixed pixel permutations: two classes a task, as many tasks as wanted",
    classes="2 a task",
    images="about 144 + 36 a class",
    size="nothing",
    licence=UNSURE,
    load=load_permuted_digits,
    tasks=PERMUTED_DIGITS_TASKS,
    page=DIGITS_PAGE,
    notes=(
        "The images come with scikit-learn.",
        "Ten classes a permutation, p00-0 to p00-9, p01-0, ...: --tasks 200 has 40 permutations.",
        "Permutations follow one another; --order is the order of the digits within each of them.",
        "--classes sets the number of classes where a task is to have more than two.",
    ),
)
