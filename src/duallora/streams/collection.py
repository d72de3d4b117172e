"""What a named stream is made of: its entry in the list, what is asked of it, the images it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from duallora.errors import DualLoRAError
from duallora.streams.sizes import Sizes
from duallora.streams.split import Group

Scenario = Literal["class", "domain"]

UNSURE = "see its page"
"""Where a fact about a data set is not known for certain."""


@dataclass(frozen=True)
class Part:
    """The images of one domain.

    Attributes:
        domain: its name; a data set that has no domains is one part without a name.
        train: labelled images with class names; None of them is decoded yet.
        test: the same to test on; None takes the test images from the training images.
    """

    domain: str
    train: Dataset[Any]
    test: Dataset[Any] | None


@dataclass(frozen=True)
class Collection:
    """The images that a loader found.

    Attributes:
        name: of the stream; it names the split where there is more than one.
        parts: one, or one a domain in the order in which they are learned.
        augmentation: the policy that suits these images.
        group: groups of classes that come one after another; as for ``split``.
    """

    name: str
    parts: tuple[Part, ...]
    augmentation: str = "crop,flip"
    group: Group | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of a loader.

    Attributes:
        entry: what is loaded.
        rest: what the user wrote after the prefix: a path or a name.
        data: folder that holds the data sets.
        split_lists: folder of published lists of images to train and to test on.
        holdout: whether the test images are taken from the training images.
        tasks: number of tasks, or the number of classes of each.
        classes: take so many classes; None takes all.
        first_classes: number of classes of the first task, where it is set apart.
    """

    entry: StreamEntry
    rest: str
    data: Path
    split_lists: Path | None
    holdout: bool
    tasks: Sizes
    classes: int | None
    first_classes: int | None

    def root(self) -> Path:
        """The folder of the data set.

        Raises:
            DualLoRAError: it is not there or incomplete; the message says what to fetch and where to put it.
        """
        entry = self.entry
        found = entry.find(self.data)
        if found is not None:
            return found
        there = next((self.data / p for p in entry.places if (self.data / p).is_dir()), None)
        if there is None:
            raise self.missing()
        lacks = [name for name in entry.needs if not (there / name).exists()]
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise self.missing(f"{there} lacks {', '.join(lacks[:3])}{more} of {entry.name}")

    def missing(self, what: str | None = None) -> DualLoRAError:
        """The sentence that says what to fetch and where to put it."""
        entry = self.entry
        what = what or f"the images of {entry.name} are not in {self.data / entry.folder}"
        return DualLoRAError(
            f"{what}: fetch {entry.files} ({entry.page}) and unpack it there, or name the folder that holds "
            f"{entry.folder}/ with --data; `duallora streams {entry.name}` shows the layout"
        )


@dataclass(frozen=True)
class StreamEntry:
    """A stream by name.

    Attributes:
        name: what the user writes; words in capitals are theirs to fill in.
        summary: what it is, in a few words.
        classes: their number.
        images: how many to train + how many to test on.
        size: of the files to fetch.
        licence: in a word.
        load: finds the images; nothing is decoded.
        scenario: the usual one.
        tasks: usual number of tasks, where classes are divided among them.
        page: official page.
        files: what to fetch there.
        folder: where to put it, below the folder of ``--data``.
        places: folders below that of ``--data`` where it is looked for, the first one first.
        needs: what has to lie there.
        layout: what lies there, a line each.
        notes: on splits, orders and published protocols, a sentence each.
        takes_lists: whether ``split_lists`` means anything to it.
    """

    name: str
    summary: str
    classes: str
    images: str
    size: str
    licence: str
    load: Callable[[Request], Collection]
    scenario: Scenario = "class"
    tasks: int = 10
    page: str = ""
    files: str = ""
    folder: str = ""
    places: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    takes_lists: bool = False

    def find(self, data: Path) -> Path | None:
        """The first of ``places`` below ``data`` that holds all it needs; None where there is none."""
        for place in self.places:
            root = data / place
            if root.is_dir() and all((root / name).exists() for name in self.needs):
                return root
        return None
