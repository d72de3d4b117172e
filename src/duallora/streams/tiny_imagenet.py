"""Tiny-ImageNet-200 in its original layout."""

from __future__ import annotations

from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.collection import Collection, Part, Request, StreamEntry
from duallora.streams.listed import (
    Labelled,
    ListedImages,
    images_below,
    read_lines,
    require_listed,
)


def load_tiny_imagenet(request: Request) -> Collection:
    """Trains on ``train/`` and tests on ``val/``, whose labels are in a list; ``test/`` has none.

    Raises:
        DualLoRAError: files are missing, or a list is not as in the original.
    """
    root = request.root()
    wnids = read_lines(root / "wnids.txt")
    train = [(key, wnid) for wnid in wnids for key in _images(root, wnid)]
    return Collection(
        request.entry.name,
        (Part("", ListedImages(root, train), ListedImages(root, _validation(root, wnids))),),
    )


def _images(root: Path, wnid: str) -> list[str]:
    folder = f"train/{wnid}/images"
    found = images_below(root, folder) if (root / folder).is_dir() else []
    if not found:
        raise DualLoRAError(
            f"{root / folder} has no images and wnids.txt names {wnid}: unpack the archive again"
        )
    return found


def _validation(root: Path, wnids: list[str]) -> list[Labelled]:
    path, known = root / "val" / "val_annotations.txt", set(wnids)
    images = []
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) < 2 or words[1] not in known:
            raise DualLoRAError(
                f"line {number} of {path} has no file and class of wnids.txt: unpack the archive again"
            )
        images.append((f"val/images/{words[0]}", words[1]))
    require_listed(root, [key for key, _ in images], str(path))
    return images


TINY_IMAGENET = StreamEntry(
    name="tiny-imagenet",
    summary="64 x 64 photographs of ImageNet classes",
    classes="200",
    images="100,000 + 10,000",
    size="237 MB",
    licence="non-commercial research and education",
    load=load_tiny_imagenet,
    page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    files="tiny-imagenet-200.zip",
    folder="tiny-imagenet",
    places=("tiny-imagenet/tiny-imagenet-200", "tiny-imagenet", "tiny-imagenet-200"),
    needs=("wnids.txt", "train", "val/val_annotations.txt"),
    layout=(
        "tiny-imagenet-200/wnids.txt",
        "tiny-imagenet-200/train/<wnid>/images/<file>.JPEG",
        "tiny-imagenet-200/val/val_annotations.txt",
        "tiny-imagenet-200/val/images/<file>.JPEG",
    ),
    notes=(
        "The images to test on are those of val/; the labels of test/ are not public.",
        "Classes are named by their WordNet id.",
    ),
)
