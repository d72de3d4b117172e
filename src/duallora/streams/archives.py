"""Data sets that the field passes round as repacked archives with ``train/`` and ``test/``."""

from __future__ import annotations

from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.folder import FolderDataset

_PAGE = "https://github.com/sun-hailong/LAMDA-PILOT"


def load_archive(request: Request) -> Collection:
    """Reads ``train/<class>/`` and ``test/<class>/``.

    Raises:
        DualLoRAError: a folder is missing or unusable.
    """
    root = request.root()
    test = None if request.holdout else FolderDataset(root / "test")
    return Collection(request.entry.name, (Part("", FolderDataset(root / "train"), test),))


def _entry(
    name: str,
    summary: str,
    classes: int,
    images: str,
    *notes: str,
    licence: str = UNSURE,
    tasks: int = 10,
    place: str | None = None,
) -> StreamEntry:
    # Unpacked beside the others, or in a folder of its own.
    inside = () if place is None else (place, f"{name}/{place}")
    return StreamEntry(
        name=name,
        summary=summary,
        classes=str(classes),
        images=images,
        size=UNSURE,
        licence=licence,
        load=load_archive,
        tasks=tasks,
        page=_PAGE,
        files=f"the repacked {name} archive",
        folder=name,
        places=(*inside, f"{name}/{name}", name),
        needs=("train", "test"),
        layout=("train/<class>/<file>", "test/<class>/<file>"),
        notes=(
            *notes,
            "The original has no split into training and test images: the archive's folders are the split.",
        ),
    )


ARCHIVES = (
    _entry("imagenet-a", "photographs that ImageNet models get wrong", 200, "7,500 in all"),
    _entry(
        "objectnet",
        "objects in unusual places and poses, 200 of 313 classes",
        200,
        UNSURE,
        "ObjectNet's own terms say that it may never be used to tune the parameters of a model.",
        licence="forbids tuning models on it, see its page",
    ),
    _entry("omnibenchmark", "300 classes out of OmniBenchmark's realms", 300, UNSURE),
    _entry(
        "vtab",
        "ten classes of each of five data sets of VTAB",
        50,
        UNSURE,
        "Published with the classes in alphabetical order, not shuffled: --order alphabetical.",
        tasks=5,
        place="vtab-cil/vtab",
    ),
)
