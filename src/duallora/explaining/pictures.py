"""Explanations of image files, written as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from duallora.errors import DualLoRAError
from duallora.explaining.explain import Explanation, explain
from duallora.storage.atomic import write_atomic

if TYPE_CHECKING:
    from duallora.learner import ContinualLearner


@dataclass(frozen=True)
class Explained:
    """An explanation, and the file that its picture is in."""

    explanation: Explanation
    picture: Path


def write_explanations(learner: ContinualLearner, paths: Sequence[Path], folder: Path) -> list[Explained]:
    """Explains the answer for every image file, and writes each picture as ``NAME.why.png``.

    Args:
        learner: has learned two classes or more.
        paths: of the images.
        folder: made where it does not exist; pictures of an earlier call are replaced.

    Raises:
        DualLoRAError: an image cannot be read, or there is no place for the pictures.
    """
    require_folder(folder, "--explain")
    taken: set[str] = set()
    found = []
    for path in paths:
        explanation = explain(learner, path)
        name, number = f"{path.name}.why.png", 1
        while name in taken:  # of another folder
            number += 1
            name = f"{path.name}.{number}.why.png"
        taken.add(name)
        write_atomic(folder / name, as_png(explanation.overlay))
        found.append(Explained(explanation, folder / name))
    return found


def require_folder(folder: Path, option: str) -> None:
    """Makes a folder for what is written, where it is not there yet.

    Raises:
        DualLoRAError: there is a file in its place, or its parent does not exist.
    """
    if folder.exists() and not folder.is_dir():
        raise DualLoRAError(f"{option} {folder} is a file; name a folder.")
    if not folder.absolute().parent.is_dir():
        raise DualLoRAError(f"the folder of {option} {folder} does not exist; create it first.")
    folder.mkdir(exist_ok=True)


def as_png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
