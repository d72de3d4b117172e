"""Image files that lists name, rather than the folders they lie in."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from duallora.data.images import find_images, read_image
from duallora.errors import DualLoRAError
from duallora.storage.regular import read_text

_SPLIT_SEED = 1993
_TEST_SHARE = 5

Labelled = tuple[str, str]
"""The path of an image within its folder, with slashes, and the name of its class."""


class ListedImages(Dataset[tuple[Image.Image, int]]):
    """Images of known classes, decoded when asked for.

    Attributes:
        classes: the names of the classes that have an image, sorted.
        targets: index into ``classes`` per image.
        identifiers: per image, its path within the folder.
        paths: the files, sorted by identifier.
    """

    def __init__(self, root: Path, images: Iterable[Labelled], paths: dict[str, Path] | None = None) -> None:
        """Takes the list without opening a file.

        Args:
            root: folder of the images.
            images: path within it and class of every image.
            paths: where the files lie, by their path in ``images``; where it is not given, below ``root``.
        """
        listed = sorted(images)
        self.classes = sorted({name for _, name in listed})
        position = {name: i for i, name in enumerate(self.classes)}
        self.targets = [position[name] for _, name in listed]
        # File names need not be unicode; what is written to reports has to be.
        self.identifiers = [key.encode("utf-8", "backslashreplace").decode("utf-8") for key, _ in listed]
        self.paths = [root / key if paths is None else paths[key] for key, _ in listed]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.targets[index]


def images_below(root: Path, folder: str) -> list[str]:
    """Paths of the images below a folder of ``root``, within ``root`` and sorted.

    Raises:
        DualLoRAError: the folder is missing.
    """
    return [path.relative_to(root).as_posix() for path in find_images(root / folder)]


def class_folders(root: Path, folder: str) -> list[Labelled]:
    """The images of ``folder/<class>/``, folders below that included."""
    start = len(Path(folder).parts)
    return [
        (key, Path(key).parts[start])
        for key in images_below(root, folder)
        if len(Path(key).parts) > start + 1
    ]


def require_listed(root: Path, keys: Sequence[str], source: str) -> None:
    """Refuses a list that names images which are not there; every folder is read once.

    Args:
        root: folder of the images.
        keys: their paths within it.
        source: the list, for the message.

    Raises:
        DualLoRAError: naming the first missing one.
    """
    there: dict[str, set[str]] = {}
    missing = []
    for key in keys:
        folder, _, file = key.rpartition("/")
        if folder not in there:
            place = root / folder
            there[folder] = {path.name for path in place.iterdir()} if place.is_dir() else set()
        if file not in there[folder]:
            missing.append(key)
    if missing:
        raise DualLoRAError(
            f"{source} names {len(missing)} of {len(keys)} images that are not in {root}, the first is "
            f"{missing[0]}: unpack the archives again"
        )


def stratified(images: Iterable[Labelled], domain: str = "") -> tuple[list[Labelled], list[Labelled]]:
    """A seeded split where there is no official one: of each class, four fifths to train on.

    The paths of a class are sorted and permuted by ``numpy.random.RandomState([1993, crc32(class)])``; the
    first fifth of them, rounded to the nearest and at least one where there are two, is the test part. So a
    class keeps its split whatever other classes there are.

    Args:
        images: path and class of every image.
        domain: stands before the class, with a slash, in what is hashed.

    Returns:
        Those to train on and those to test on.
    """
    members: dict[str, list[str]] = {}
    for key, name in sorted(images):
        members.setdefault(name, []).append(key)
    train: list[Labelled] = []
    test: list[Labelled] = []
    for name, keys in members.items():
        seed = zlib.crc32((f"{domain}/{name}" if domain else name).encode("utf-8", "backslashreplace"))
        order = np.random.RandomState([_SPLIT_SEED, seed]).permutation(len(keys)).tolist()
        held = max(1, round(len(keys) / _TEST_SHARE)) if len(keys) > 1 else 0
        test += [(keys[i], name) for i in order[:held]]
        train += [(keys[i], name) for i in order[held:]]
    return train, test


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not empty.

    Raises:
        DualLoRAError: it cannot be read as text.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DualLoRAError(f"{path} cannot be read as a text file: unpack the archive again") from error
    return [line.strip() for line in lines if line.strip()]
