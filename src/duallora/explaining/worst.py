"""The images that a learner is most surely wrong about, as a table and a sheet of small pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from duallora.data.images import read_image
from duallora.explaining.pictures import as_png, require_folder
from duallora.outputs import Mistake
from duallora.storage.atomic import write_atomic

_TILE = 144  # pixels of a small picture
_LINE = 16  # pixels of a line of text
_COLUMNS = 6
_LONGEST = 22  # letters of a name that fit under a picture


def write_worst(mistakes: Sequence[Mistake], paths: Sequence[Path], folder: Path) -> tuple[Path, Path]:
    """Writes ``worst.csv`` and ``worst.png`` of mistakes, in their order.

    Args:
        mistakes: at least one.
        paths: of all images that were looked at.
        folder: made where it does not exist; files of an earlier call are replaced.

    Returns:
        The table and the sheet.

    Raises:
        DualLoRAError: an image cannot be read any more, or there is no place for the files.
    """
    require_folder(folder, "--worst-out")
    table, sheet = folder / "worst.csv", folder / "worst.png"
    write_atomic(table, _as_csv(mistakes, paths))
    write_atomic(sheet, as_png(_sheet(mistakes, paths)))
    return table, sheet


def _as_csv(mistakes: Sequence[Mistake], paths: Sequence[Path]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "true", "answer", "probability", "probability_of_true"])
    for each in mistakes:
        writer.writerow(
            [paths[each.index], each.true, each.answer, each.probability, each.probability_of_true]
        )
    return text.getvalue().encode("utf-8", "surrogateescape")


def _sheet(mistakes: Sequence[Mistake], paths: Sequence[Path]) -> Image.Image:
    columns = min(_COLUMNS, len(mistakes))
    height = _TILE + 2 * _LINE + 8
    rows = math.ceil(len(mistakes) / columns)
    sheet = Image.new("RGB", (columns * (_TILE + 8), rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, each in enumerate(mistakes):
        left, upper = place % columns * (_TILE + 8) + 4, place // columns * height + 4
        picture = read_image(paths[each.index])
        scale = _TILE / max(picture.size)
        wide, high = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((wide, high))
        sheet.paste(picture, (left + (_TILE - picture.width) // 2, upper + (_TILE - picture.height) // 2))
        for line, words in enumerate((f"is {each.true}", f"{each.probability:.0%} {each.answer}")):
            draw.text((left, upper + _TILE + line * _LINE), _short(words), fill="black", font=font)
    return sheet


def _short(words: str) -> str:
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."
