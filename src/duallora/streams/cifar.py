"""CIFAR-10 and CIFAR-100, as torchvision reads and fetches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry


class CifarDataset(Dataset[tuple[Image.Image, int]]):
    """One part of a CIFAR data set, with torchvision's class names and images known by their position."""

    def __init__(self, images: Any, part: str) -> None:
        """Takes torchvision's data set.

        Args:
            images: it, without transforms.
            part: ``train`` or ``test``.
        """
        self.classes = list(images.classes)
        self.targets = list(images.targets)
        self.identifiers = [f"{part}/{i}" for i in range(len(self.targets))]
        self._images = images

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[index][0], self.targets[index]


def load_cifar(request: Request) -> Collection:
    """Reads a CIFAR data set, and fetches it where it is not there.

    Raises:
        DualLoRAError: it is not there and cannot be fetched, or its files are damaged.
    """
    from torchvision import datasets

    entry = request.entry
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[entry.name]
    root = entry.find(request.data)
    fetched = root is None
    if root is None:
        root = request.data / entry.folder
        _fetch(request, kind, root)
    try:
        # torchvision unpickles these files, and only where they have the published checksums.
        train, test = (CifarDataset(kind(root, train=train), part) for train, part in _PARTS)
    except RuntimeError as error:
        what = f"{root / kind.base_folder} is incomplete or damaged, it has not the published checksums"
        raise DualLoRAError(
            f"{what}: remove it and {'try again' if fetched else f'unpack {kind.filename} again'}"
        ) from error
    return Collection(entry.name, (Part("", train, test),))


_PARTS = ((True, "train"), (False, "test"))


def _fetch(request: Request, kind: Any, root: Path) -> None:
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        kind(root, train=True, download=True)
    except (OSError, RuntimeError) as error:  # no network, no space, a broken archive
        for folder in made:  # what failed leaves nothing behind; from the innermost outwards
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        reason = str(getattr(error, "reason", error)).rstrip(".") or type(error).__name__
        what = f"the images of {request.entry.name} are not in {root}, and fetching them failed ({reason})"
        raise request.missing(what) from error


def _entry(name: str, classes: int, tasks: int, archive: str, folder: str, size: str) -> StreamEntry:
    return StreamEntry(
        name=name,
        summary=f"32 x 32 photographs of {classes} kinds of things",
        classes=str(classes),
        images="50,000 + 10,000",
        size=size,
        licence=UNSURE,
        load=load_cifar,
        tasks=tasks,
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        files=archive,
        folder=name,
        places=(name, "."),
        needs=(folder,),
        layout=(f"{folder}/", f"{archive} (alone will do: it is unpacked)"),
        notes=(
            "Fetched when it is not there and the network is.",
            "The class names are torchvision's, whose numbering is that of the sorted names.",
        ),
    )


CIFAR = (
    _entry("cifar100", 100, 10, "cifar-100-python.tar.gz", "cifar-100-python", "161 MB"),
    _entry("cifar10", 10, 5, "cifar-10-python.tar.gz", "cifar-10-batches-py", "163 MB"),
)
