"""Images of one's own: a folder or a table of them."""

from __future__ import annotations

from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.collection import Collection, Part, Request, StreamEntry
from duallora.streams.folder import FolderDataset, train_and_val
from duallora.streams.table import read_table


def is_table(path: Path) -> bool:
    """Whether the path is an existing CSV file."""
    return path.suffix.lower() == ".csv" and path.is_file()


def load_path(request: Request) -> Collection:
    """A folder of images, or a table of them.

    Raises:
        DualLoRAError: there is neither, or it cannot be used.
    """
    if not request.rest:
        raise DualLoRAError("folder: needs a path: write folder:PATH")
    path = Path(request.rest)
    if is_table(path):
        return read_table(path)
    train, val = train_and_val(path)
    test = None if val is None or request.holdout else FolderDataset(val)
    return Collection(path.resolve().name, (Part("", FolderDataset(train), test),))


FOLDER = StreamEntry(
    name="folder:PATH",
    summary="a folder of images, one folder a class, or a table PATH.csv of them; the path alone will do",
    classes="-",
    images="-",
    size="-",
    licence="-",
    load=load_path,
    layout=(
        "PATH/train/<class>/<file> and PATH/val/<class>/<file> (or test/)",
        "PATH/<class>/<file>",
        "PATH.csv with the header path,label and perhaps split and domain; paths count from its folder",
    ),
    notes=(
        "Without val/ or test/, and without test rows, every fifth image of a class is a test image.",
        "A table with domains is one task a domain, in the order in which they first appear; --scenario "
        "class pools them.",
    ),
)
