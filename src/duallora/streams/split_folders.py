"""Folders named after a part of a data set: which of them is trained on, which one is tested on."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duallora.data.images import is_image_name
from duallora.errors import DualLoRAError

Role = Literal["train", "val", "test"]

_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validate", "validation", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_WORDS: dict[str, Role] = {word: part for part, words in _NAMES.items() for word in words}
_AFTER = re.compile(r"(s|set|sets|data|dataset|images|imgs|split|folder)?\d*")
_BETWEEN = re.compile(r"[\s._-]+")


def role(name: str) -> Role | None:
    """The part of a data set that a name stands for, in any case: train, ``Valid``, ``test_set``, val2017.

    Returns:
        None for any other name.
    """
    plain = _BETWEEN.sub("", unicodedata.normalize("NFKC", name).casefold())
    for word in sorted(_WORDS, key=len, reverse=True):
        if plain.startswith(word) and _AFTER.fullmatch(plain, len(word)):
            return _WORDS[word]
    return None


@dataclass(frozen=True)
class Inside:
    """A folder among others.

    Attributes:
        name: of the folder.
        folders: whether there are folders in it.
        images: whether there is an image in it or in a folder below.
    """

    name: str
    folders: bool
    images: bool


@dataclass(frozen=True)
class Parts:
    """Which folder is trained on, and which one is tested on; None where there is none."""

    train: str | None
    held_out: str | None


def parts(inside: Sequence[Inside], where: str) -> Parts | None:
    """Tells a data set that is divided into folders from one of class folders.

    A class may be called "train" or "test": its folder holds images, while that of a part holds folders.

    Args:
        inside: the folders, hidden ones left out.
        where: the folder that holds them, for the message.

    Returns:
        None for class folders. Where both are there, ``val/`` is tested on and not ``test/``.

    Raises:
        DualLoRAError: it could be either, or it is not clear which folder is meant.
    """
    named = [(each, part) for each in inside if (part := role(each.name)) is not None]
    found = [(each, part) for each, part in named if each.folders]
    if not found:
        _refuse_no_classes(inside, named, where)
        return None
    shown = _shown(each.name for each, _ in found)
    empty = {each.name for each, _ in named if not each.folders and not each.images}
    others = [each for each in inside if each not in [e for e, _ in found] and each.name not in empty]
    others = [each for each in others if each.images]
    if others:
        raise DualLoRAError(
            f"{where} holds {shown} with folders in it and, beside it, {_shown(e.name for e in others)} with "
            "images: these may be classes or parts of a data set; move what is not meant out of the folder, "
            "name the one folder that is meant, or, if they are all classes, put them into train/"
        )
    by_role: dict[Role, list[str]] = {}
    for each, part in found:
        by_role.setdefault(part, []).append(each.name)
    for names in by_role.values():
        if len(names) > 1:
            raise DualLoRAError(
                f"{where} holds {_shown(names)}, which may mean the same: keep one of them there, or join "
                "them"
            )
    train, val, test = (by_role.get(part, [None])[0] for part in ("train", "val", "test"))
    return Parts(train, val or test)


def parts_of(folder: Path) -> Parts | None:
    """As :func:`parts`, for the folders in a folder."""
    inside = [entry for entry in sorted(folder.iterdir()) if is_class_folder(entry)]
    if not any(role(entry.name) for entry in inside):  # nothing is looked into then: there may be millions
        return None
    return parts([Inside(e.name, _holds_folder(e), _holds_image(e)) for e in inside], str(folder))


def is_class_folder(entry: Path) -> bool:
    """Whether an entry of a folder is a folder that may hold images."""
    return entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))


def _refuse_no_classes(inside: Sequence[Inside], named: list[tuple[Inside, Role]], where: str) -> None:
    """Refuses parts that hold images of no class: as class folders they would teach the words for parts."""
    roles = {part for each, part in named if each.images}
    if "train" in roles and len(roles) > 1 and len(named) == len(inside):
        shown = _shown(each.name for each, _ in named)
        raise DualLoRAError(
            f"{where} holds {shown} with images and no class folders: put the images into one folder a class "
            "below each of them"
        )


def _holds_folder(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and is_class_folder(Path(entry)) for entry in entries)


def _holds_image(folder: Path, depth: int = 4) -> bool:
    """Whether there is an image; links may lead in circles, so it goes down a few folders only."""
    with os.scandir(folder) as found:
        entries = [Path(entry) for entry in found]
    if any(is_image_name(each) and each.is_file() for each in entries):
        return True
    return depth > 0 and any(_holds_image(each, depth - 1) for each in entries if is_class_folder(each))


def _shown(names: Iterable[str]) -> str:
    shown = [f"{name}/" for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
