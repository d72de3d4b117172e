"""CUB-200-2011 in its original layout, with its official split."""

from __future__ import annotations

from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.listed import ListedImages, read_lines, require_listed

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def load_cub(request: Request) -> Collection:
    """Reads the four lists, which name the images, their classes and the part each belongs to.

    Raises:
        DualLoRAError: files are missing, or the lists do not fit together.
    """
    root = request.root()
    files, labels, parts, names = (_table(root / name) for name in _LISTS)
    images = root / "images"
    for image in files:
        if labels.get(image) not in names or parts.get(image) not in ("0", "1"):
            raise DualLoRAError(
                f"the lists in {root} say nothing of the class or the split of image {image}: "
                "unpack the archive again"
            )
    require_listed(images, list(files.values()), str(root / "images.txt"))
    train, test = (
        ListedImages(
            images, [(key, names[labels[image]]) for image, key in files.items() if parts[image] == part]
        )
        for part in ("1", "0")
    )
    return Collection(request.entry.name, (Part("", train, test),))


def _table(path: Path) -> dict[str, str]:
    """The second column of a list by the first."""
    rows = [line.split(maxsplit=1) for line in read_lines(path)]
    if any(len(row) != 2 for row in rows):
        raise DualLoRAError(f"{path} has a line that is not two words: unpack the archive again")
    return {row[0]: row[1] for row in rows}


CUB = StreamEntry(
    name="cub200",
    summary="birds of 200 species",
    classes="200",
    images="5,994 + 5,794",
    size="1.1 GB",
    licence=UNSURE,
    load=load_cub,
    page="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    files="CUB_200_2011.tgz",
    folder="cub200",
    places=("cub200/CUB_200_2011", "cub200", "CUB_200_2011"),
    needs=(*_LISTS, "images"),
    layout=(
        "CUB_200_2011/images.txt, image_class_labels.txt, train_test_split.txt, classes.txt",
        "CUB_200_2011/images/<class>/<file>.jpg",
    ),
    notes=(
        "The split is that of train_test_split.txt. Figures on repacked archives of this data set (a folder "
        "cub with train/ and test/) use another one: name such a folder with folder:PATH.",
        "Classes are named as in classes.txt, such as 001.Black_footed_Albatross.",
    ),
)
