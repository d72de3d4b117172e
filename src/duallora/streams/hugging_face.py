"""Image data sets of the Hugging Face hub, or saved by its library."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from duallora.data.images import to_pil
from duallora.errors import DualLoRAError
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry

_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "validation", "valid", "val")
_LABELS = ("label", "labels", "fine_label", "target", "class")


class HubDataset(Dataset[tuple[Image.Image, int]]):
    """One split of a data set of the ``datasets`` library.

    Attributes:
        classes: the names of the label column's classes; of a column of texts or numbers, its values as text.
        targets: index into ``classes`` per image.
        identifiers: the split and the position in it.
    """

    def __init__(self, rows: Any, split: str, image: str, label: str) -> None:
        """Reads the labels; images are decoded when asked for.

        Args:
            rows: the split.
            split: its name.
            image: name of the column of images.
            label: name of the column of labels.
        """
        values = list(rows[label])
        names = getattr(rows.features[label], "names", None)
        if names is None:
            values = [str(value) for value in values]
            self.classes = sorted(set(values))
            position = {name: i for i, name in enumerate(self.classes)}
            self.targets = [position[value] for value in values]
        else:
            self.classes = list(names)
            self.targets = [-1 if value is None else int(value) for value in values]
        self.identifiers = [f"{split}/{i}" for i in range(len(values))]
        self._rows, self._image = rows, image

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return to_pil(self._rows[index][self._image]), self.targets[index]
        except Exception as error:  # whatever a broken file makes the decoders raise
            raise DualLoRAError(
                f"image {self.identifiers[index]} cannot be decoded ({_first_line(error)}): leave it out of "
                "the data set"
            ) from error


def load_hub(request: Request) -> Collection:
    """Loads ``NAME``, ``NAME:CONFIGURATION`` or a saved folder, and finds its columns and splits.

    The images are in the first column of type Image. The classes are those of a column of type ClassLabel:
    the one named ``label``, or the one with the most classes. Without one, they are the values of a column of
    texts or numbers named ``label``, ``labels``, ``fine_label``, ``target`` or ``class``. The images to train
    on are the split ``train`` (or the only one), those to test on ``test``, or ``validation`` where there is
    no ``test`` or its labels are not public; without either, every fifth image of a class is tested on.

    Raises:
        DualLoRAError: the library, the data set, a column or a split is missing.
    """
    name = f"hf:{request.rest}"
    if not request.rest:
        raise DualLoRAError("hf: needs a name: write hf:NAME, as the hub spells it, or hf:FOLDER")
    splits = _splits(request.rest)
    train = next((split for split in (*_TRAIN, *splits) if split in splits), None)
    if train is None or (train not in _TRAIN and len(splits) > 1):
        raise DualLoRAError(f"{name} has no split train (it has {', '.join(splits) or 'none'}): rename one")
    image, label = _columns(name, splits[train].features)
    tests = [] if request.holdout else [s for s in _TEST if s in splits and _labelled(splits[s], label)]
    parts = [HubDataset(splits[split], split, image, label) for split in (train, *tests[:1])]
    return Collection(name, (Part("", parts[0], parts[1] if tests else None),))


def _splits(what: str) -> Mapping[str, Any]:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DualLoRAError(
            "hf: streams need the datasets library, which is not installed: pip install 'duallora[hf]'"
        ) from error
    folder = Path(what)
    try:
        if any((folder / file).is_file() for file in _SAVED):
            found = library.load_from_disk(what)
        else:
            hub, _, configuration = (what, "", "") if folder.exists() else what.partition(":")
            found = library.load_dataset(hub, configuration or None)
    except Exception as error:  # the library raises errors of many kinds, and others by version
        raise DualLoRAError(
            f"hf:{what} cannot be loaded ({_first_line(error)}): check the name and the network, or save it "
            "elsewhere with save_to_disk and name the folder"
        ) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if image is None:
        raise DualLoRAError(
            f"{name} has no column of type Image (its columns are {', '.join(kinds)}): cast one to it and "
            "save the data set with save_to_disk"
        )
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if classes:
        return image, max(classes, key=lambda column: (column == "label", len(features[column].names)))
    plain = next((column for column in _LABELS if kinds.get(column) == "Value"), None)
    if plain is None:
        raise DualLoRAError(
            f"{name} has no column of type ClassLabel (its columns are {', '.join(kinds)}): rename the one "
            "of the labels to label and save the data set with save_to_disk"
        )
    return image, plain


def _labelled(rows: Any, label: str) -> bool:
    """Whether a split has public labels; hidden ones are -1 or missing throughout."""
    return any(value is not None and value != -1 for value in rows[label])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


HUB = StreamEntry(
    name="hf:NAME",
    summary="a data set of the Hugging Face hub, or a folder that its library saved",
    classes="-",
    images="-",
    size="-",
    licence=UNSURE,
    load=load_hub,
    page="the card of the data set on the Hugging Face hub",
    layout=("hf:NAME or hf:NAME:CONFIGURATION, as the hub spells it", "hf:FOLDER, what save_to_disk wrote"),
    notes=(
        "Needs the extra hf: pip install 'duallora[hf]'.",
        "Images are in the first column of type Image, classes in one of type ClassLabel.",
        "Trained on train; tested on test, or on validation where test has no labels.",
    ),
)
