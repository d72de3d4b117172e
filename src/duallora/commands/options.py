"""Groups of options that several commands share; each field is an option, its description the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from duallora.errors import DualLoRAError

Order = int | Literal["alphabetical"]


@dataclass(frozen=True)
class StreamOptions:
    """What is learned, and in which order.

    Attributes:
        stream: digits, a folder of images with train/ and val/, a .csv file of paths and labels, or a name of
            duallora streams
        data: folder that holds the data sets that duallora streams names; where it is not given, ./data
        split_lists: folder with the two lists of the public split of imagenet-r
        scenario: class, tasks of new classes; domain, tasks of new domains; where it is not given, what the
            data set is made for
        domains: show the same images in several domains, one task each, separated by commas: photo, edges,
            negative, pixelated, posterised
        tasks: number of tasks, or the numbers of their classes, separated by commas; where it is not given, 5
            for digits and 10 for a folder
        first_classes: classes of the first task; the others share the rest
        repeat: share of the classes seen before that comes again in every task, with other images
        order: seed of the class order (1993 is the usual one of benchmarks), or alphabetical
        classes: take the first so many of the sorted class names
        train_per_class: take the first so many training images of each class
        holdout: test on the next so many training images of each class; val/ is not read then
    """

    stream: str = "digits"
    data: Path | None = None
    split_lists: Path | None = None
    scenario: Literal["class", "domain"] | None = None
    domains: str | None = None
    tasks: int | str | None = None
    first_classes: int | None = None
    repeat: float = 0.0
    order: Order = 1993
    classes: int | None = None
    train_per_class: int | None = None
    holdout: int = 0

    def asked(self) -> dict[str, Any]:
        """What was asked of the stream, ready for ``streams.load``; where images lie is no part of it.

        Raises:
            DualLoRAError: sizes of tasks that are no numbers.
        """
        shown = () if self.domains is None else tuple(name.strip() for name in self.domains.split(","))
        asked: dict[str, Any] = {
            "tasks": _tasks(self.tasks),
            "order": self.order,
            "classes": self.classes,
            "train_per_class": self.train_per_class,
            "holdout": self.holdout,
            "domains": shown,
        }
        # Named only where they are used, so that runs from before they were there are the same runs still.
        later = {
            "scenario": self.scenario,
            "first_classes": self.first_classes,
            "repeat": self.repeat or None,
        }
        return asked | {key: value for key, value in later.items() if value is not None}


def _tasks(given: int | str | None) -> int | list[int] | None:
    if not isinstance(given, str):
        return given
    try:
        sizes = [int(part) for part in given.split(",")]
    except ValueError as error:
        raise DualLoRAError(
            f"--tasks must be a number, or numbers of classes separated by commas, not {given!r}."
        ) from error
    return sizes if len(sizes) > 1 else sizes[0]


@dataclass(frozen=True)
class BackboneOptions:
    """The frozen backbone, and how images reach it.

    Attributes:
        backbone: embedded, a timm ViT by its full tag, or hf:NAME for a ViT of transformers; see duallora
            backbones
        backbone_file: local .safetensors file with the backbone's weights
        image_size: height and width of the input in pixels, where it is not that of the pre-training
        normalization: of the pixels: that of the backbone's pre-training, that of ImageNet, or none
        crop_pct: share of the resized image that the centre crop keeps, where it is not the backbone's
        interpolation: bicubic or bilinear, where it is not the backbone's
        augment: views of the training images, parts joined by a comma: crop keeps at least .6 of the image,
            crop=SHARE at least that share, flip mirrors; or none. Where it is not given, crop for digits and
            crop,flip otherwise
    """

    backbone: str = "embedded"
    backbone_file: Path | None = None
    image_size: int | None = None
    normalization: Literal["backbone", "imagenet", "none"] = "backbone"
    crop_pct: float | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    augment: str | None = None

    def changed(self) -> dict[str, Any]:
        """The preprocessing that is not the backbone's own, ready for ``load_backbone``."""
        own = {"image_size": None, "normalization": "backbone", "crop_pct": None, "interpolation": None}
        return {key: getattr(self, key) for key, value in own.items() if getattr(self, key) != value}
