"""What is to be taught next: images sorted into new classes, and checked before anything is learned."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from duallora.app.seen_file import Seen
from duallora.app.twins import Twins, find_twins
from duallora.app.uploads import Found
from duallora.data.decoding import Read
from duallora.data.images import is_image_name, read_image
from duallora.errors import DualLoRAError
from duallora.streams.names import normal
from duallora.streams.split_folders import Inside, parts
from duallora.streams.task import TaskDataset, as_task_dataset, check_class_names, hold_back

EVERY = 5
"""Every so many images of a class are held back; a class of fewer has none."""

FEW = 5
"""Classes of fewer images are marked."""


@dataclass(frozen=True)
class ClassCheck:
    """What was given for one new class.

    Attributes:
        name: of the class.
        images: readable files, each picture once.
        unreadable: files that are left out.
        repeated: names of files that are byte for byte another one of the class, and are left out.
        held_back: how many of the images will be held back.
    """

    name: str
    images: tuple[Seen, ...]
    unreadable: tuple[Seen, ...]
    repeated: tuple[str, ...]

    @property
    def held_back(self) -> int:
        """Images to measure on, which are not learned from."""
        return len(self.images) // EVERY


@dataclass(frozen=True)
class Check:
    """A look at all classes of a lesson.

    Attributes:
        classes: in the order in which they were given.
        twins: pictures that two classes share.
    """

    classes: tuple[ClassCheck, ...]
    twins: tuple[Twins, ...]

    @property
    def images(self) -> int:
        """Readable images of all classes."""
        return sum(len(each.images) for each in self.classes)

    @property
    def smallest(self) -> ClassCheck:
        """The class with the fewest images."""
        return min(self.classes, key=lambda each: len(each.images))

    def refusal(self) -> str | None:
        """Why these classes cannot be learned; None where they can."""
        if not self.classes:
            return "there are no classes yet; add one."
        empty = [each.name for each in self.classes if not each.images]
        if empty:
            return f"the class {empty[0]} has no readable image; add some or remove the class."
        return None

    def divided(self) -> tuple[TaskDataset, TaskDataset | None]:
        """Images to learn from and images held back, every fifth of each class.

        Raises:
            DualLoRAError: the classes cannot be learned.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise DualLoRAError(refusal)
        return hold_back(as_task_dataset(_Files(self.classes)), EVERY)


@dataclass
class Draft:
    """The classes given so far.

    Attributes:
        files: class name to what was looked at for it.
    """

    files: dict[str, list[Seen]] = field(default_factory=dict)
    _checked: tuple[int, Check] | None = field(default=None, init=False, repr=False)
    _changes: int = field(default=0, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def paths(self) -> list[Path]:
        """All files; other threads may add some meanwhile."""
        return [seen.path for own in list(self.files.values()) for seen in list(own)]

    def add(self, given: Sequence[Sequence[Found]], name: str, read: Read = read_image) -> list[str]:
        """As :meth:`adding`, at once."""
        steps = self.adding(given, name, read)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                notes: list[str] = end.value
                return notes

    def adding(
        self, given: Sequence[Sequence[Found]], name: str, read: Read = read_image
    ) -> Generator[tuple[int, int], None, list[str]]:
        """Sorts files into classes and looks at them; they are added at the end, all or none.

        Args:
            given: files; each sequence is a zip, a folder, or the loose files of one drop.
            name: of the class; where a zip or a folder has several class folders, these are the names.
            read: decodes a file.

        Yields:
            How many files were looked at, and how many there are.

        Returns:
            Notes for the user, one sentence each.

        Raises:
            DualLoRAError: the files cannot be sorted.
        """
        notes: list[str] = []
        sorted_files: dict[str, list[Found]] = defaultdict(list)
        for files in given:
            for class_name, own in by_class(files, name, notes).items():
                sorted_files[class_name] += own
        if not sorted_files:
            raise DualLoRAError("there is no file to add; choose images, a zip, or a folder.")
        check_class_names(list(sorted_files))
        known = {(own_name, seen.path) for own_name, own in self.files.items() for seen in own}
        every = [(own_name, found) for own_name, own in sorted_files.items() for found in own]
        new = [(own_name, found) for own_name, found in every if (own_name, found.path) not in known]
        looked: dict[str, list[Seen]] = {own_name: [] for own_name in sorted_files}
        for done, (own_name, found) in enumerate(new):
            yield done, len(new)
            looked[own_name].append(Seen.at(found, read))
        with self._lock:
            for own_name, seen in looked.items():
                self.files.setdefault(own_name, []).extend(seen)
            self._changes += 1
        return notes

    def remove(self, name: str) -> list[Path]:
        """Takes a class out; gives its files."""
        with self._lock:
            gone = self.files.pop(name, [])
            self._changes += 1
        return [seen.path for seen in gone]

    def clear(self) -> list[Path]:
        """Takes all classes out; gives their files."""
        return [path for name in list(self.files) for path in self.remove(name)]

    def copy(self) -> Draft:
        """The classes as they are now, for a lesson: what is added or taken out later does not change it."""
        with self._lock:
            made = Draft({name: list(own) for name, own in self.files.items()})
            if self._checked is not None and self._checked[0] == self._changes:
                made._checked = made._changes, self._checked[1]
            return made

    def release(self, taught: Draft) -> None:
        """Takes out what was taught; what was added since the copy was made stays."""
        with self._lock:
            for name, learned in taught.files.items():
                gone = {id(seen) for seen in learned}
                left = [seen for seen in self.files.get(name, []) if id(seen) not in gone]
                if left:
                    self.files[name] = left
                else:
                    self.files.pop(name, None)
            self._changes += 1

    def check(self) -> Check:
        """Counts, unreadable files, and pictures that two classes share."""
        changes, checked = self._changes, self._checked
        if checked is None or checked[0] != changes:
            classes = tuple(_check_class(name, own) for name, own in self.copy().files.items())
            self._checked = checked = (
                changes,
                Check(classes, tuple(find_twins([(each.name, each.images) for each in classes]))),
            )
        return checked[1]


def by_class(files: Sequence[Found], name: str, notes: list[str]) -> dict[str, list[Found]]:
    """Sorts the files of a drop, a folder or a zip into classes.

    Args:
        files: of one source. Those with a single part are loose; else the first part is the folder or zip.
        name: of the class where there are no class folders; empty takes the folder's.
        notes: gets a sentence about what is not done as asked.

    Raises:
        DualLoRAError: no name is known, or the folder holds ``train/`` and ``val/``.
    """
    name, source = normal(name), ""
    files = list(files)
    while files and all(len(found.parts) > 1 for found in files):
        tops = {found.parts[0] for found in files}
        if len(tops) > 1:
            return _by_folder(files, name, notes)
        source = tops.pop()
        files = [Found(found.path, found.parts[1:]) for found in files]
    nested = [found for found in files if len(found.parts) > 1]
    if len({found.parts[0] for found in nested}) > 1:
        left_out = len(files) - len(nested)
        told = "1 file" if left_out == 1 else f"{left_out:,} files"
        where = f" of {source}" if source else ""
        notes.append(f"{told} beside the class folders{where} {'is' if left_out == 1 else 'are'} left out.")
        return _by_folder(nested, name, notes)
    if not files:
        return {}
    if not (name or normal(source)):
        raise DualLoRAError("these images have no class name; type one into “Class name”.")
    return {name or normal(source): files}


class _Files(Dataset[tuple[Image.Image, int]]):
    """The readable images of a check, decoded when asked for."""

    def __init__(self, classes: Sequence[ClassCheck]) -> None:
        self.classes = [each.name for each in classes]
        # Sorted, so that the same images are held back in whatever order the browser sent them.
        owned = [(t, s) for t, each in enumerate(classes) for s in sorted(each.images, key=_by_name)]
        self.targets = [target for target, _ in owned]
        self.identifiers = [seen.name for _, seen in owned]
        self.paths = [seen.path for _, seen in owned]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.targets[index]


def _by_name(seen: Seen) -> tuple[str, str]:
    return seen.name, seen.digest


def _check_class(name: str, files: Sequence[Seen]) -> ClassCheck:
    images: dict[str, Seen] = {}
    repeated = []
    for seen in files:
        if seen.reason is None and images.setdefault(seen.digest, seen) is not seen:
            repeated.append(seen.name)
    unreadable = tuple(seen for seen in files if seen.reason is not None)
    return ClassCheck(name, tuple(images.values()), unreadable, tuple(repeated))


def _by_folder(files: Sequence[Found], name: str, notes: list[str]) -> dict[str, list[Found]]:
    _refuse_parts(files)
    classes: dict[str, list[Found]] = defaultdict(list)
    for found in files:
        classes[normal(found.parts[0])].append(found)
    if name:
        notes.append(f"The class name {name} is not used: the folders name {len(classes)} classes.")
    return dict(classes)


def _refuse_parts(files: Sequence[Found]) -> None:
    """Refuses a data set that is divided into parts: their names are no classes.

    Raises:
        DualLoRAError: it is, or it is not clear whether it is.
    """
    tops: dict[str, list[Found]] = defaultdict(list)
    for found in files:
        tops[found.parts[0]].append(found)
    inside = [
        Inside(name, any(len(f.parts) > 2 for f in own), any(is_image_name(f.path) for f in own))
        for name, own in tops.items()
    ]
    found_parts = parts(inside, "this folder")
    if found_parts is not None:
        shown = " and ".join(f"{each}/" for each in (found_parts.train, found_parts.held_out) if each)
        wanted = f"its {found_parts.train}/" if found_parts.train else "the images to learn from"
        raise DualLoRAError(
            f"this folder holds {shown}; give {wanted} alone, the page holds images back itself."
        )
