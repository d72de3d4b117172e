"""Folders of images: one folder a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from duallora.data.images import find_files, is_image_name, read_image, require_folder
from duallora.data.unreadable import no_image
from duallora.errors import DualLoRAError
from duallora.streams.names import normal
from duallora.streams.split_folders import Parts, is_class_folder, parts_of, role
from duallora.streams.task import check_class_names

Track = Callable[[list[Path]], Iterable[Path]]
"""Goes through the paths, for instance with a progress bar."""


_SAMPLE = 16  # files whose size says what the others are like
_SMALL = 2**14  # bytes
_MOST_THREADS = 16


class BadImagesError(DualLoRAError):
    """A folder holds files that are no readable images."""


class FolderDataset(Dataset[tuple[Image.Image, int]]):
    """The images of ``FOLDER/<class>/``, also in folders below it; decoded when asked for, never before.

    Hidden files, and files that lie beside the class folders, are left out; a warning counts the images among
    the latter. Links are followed.

    Attributes:
        folder: the folder.
        classes: the names of the class folders, sorted.
        paths: the image files, sorted within each class.
        targets: index into ``classes`` per path.
        bad_images: files left out because they cannot be read (with ``skip_bad_images``).
    """

    def __init__(self, folder: str | Path, *, skip_bad_images: bool = False) -> None:
        """Lists the files without opening them.

        Args:
            folder: the folder that holds the class folders.
            skip_bad_images: leave files that are no readable images out, instead of refusing them.

        Raises:
            DualLoRAError: the folder is missing or has no class folders; a class folder has no images, or a
                name that cannot be used; a file in it is not an image by its name and not to be skipped.
        """
        self.folder = Path(folder)
        self.skip_bad_images = skip_bad_images
        self.bad_images: list[Path] = []
        self.paths: list[Path] = []
        self.targets: list[int] = []
        class_folders = _class_folders(self.folder)
        self.classes = [name for name, _ in class_folders]
        for target, (_, class_folder) in enumerate(class_folders):
            files = find_files(class_folder)
            images = [path for path in files if is_image_name(path)]
            self.paths += images
            self.targets += [target] * len(images)
            self.bad_images += [path for path in files if not is_image_name(path)]
        if self.bad_images and not skip_bad_images:
            raise self._refusal(no_image(self.bad_images[0]), len(self.bad_images))
        self._refuse_empty_classes()
        self._tell_of_loose_images()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.targets[index]

    @property
    def identifiers(self) -> list[str]:
        """Per image, its path within the folder."""
        # File names need not be unicode; what is written to reports has to be.
        names = (normal(path.relative_to(self.folder).as_posix()) for path in self.paths)
        return [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in names]

    @property
    def labelled(self) -> list[tuple[Path | None, str]]:
        """Per image, its file and the name of its class."""
        return [(path, self.classes[target]) for path, target in zip(self.paths, self.targets, strict=True)]

    def find_bad_images(self, track: Track | None = None) -> dict[Path, str]:
        """Reads and decodes every image once.

        Args:
            track: goes through the paths, for instance with a progress bar.

        Returns:
            The files that cannot be read, each with the sentence that says why.
        """
        paths = self.paths
        # Decoders let other threads run; the work around one, which they do not, is most of a small image's.
        sample = [path.stat().st_size for path in paths[:_SAMPLE] if path.is_file()]
        small = sum(sample) < _SMALL * len(sample)
        pool = ThreadPoolExecutor(1 if small else min(_MOST_THREADS, os.cpu_count() or 1))
        try:
            found = zip(paths if track is None else track(paths), pool.map(_refusal_of, paths), strict=True)
            return {path: sentence for path, sentence in found if sentence is not None}
        finally:
            pool.shutdown(cancel_futures=True)

    def check(self, track: Track | None = None) -> None:
        """Reads and decodes every image once, and leaves bad ones out or refuses them.

        With ``skip_bad_images`` they move from ``paths`` to ``bad_images``; views made before that are stale.

        Raises:
            DualLoRAError: a file cannot be read and is not to be skipped, or a class has no other images.
        """
        bad = self.find_bad_images(track)
        if not bad:
            return
        if not self.skip_bad_images:
            raise self._refusal(next(iter(bad.values())), len(bad))
        kept = [(p, t) for p, t in zip(self.paths, self.targets, strict=True) if p not in bad]
        self.paths = [path for path, _ in kept]
        self.targets = [target for _, target in kept]
        self.bad_images += bad
        self._refuse_empty_classes()

    def _tell_of_loose_images(self) -> None:
        loose = [path for path in sorted(self.folder.iterdir()) if is_image_name(path) and path.is_file()]
        if loose:
            told = "1 image" if len(loose) == 1 else f"{len(loose):,} images"
            warnings.warn(
                f"{told} beside the class folders of {self.folder} left out, the first is {loose[0].name}: "
                "only images in a class folder have a class",
                stacklevel=3,
            )

    def _refusal(self, sentence: str, count: int) -> BadImagesError:
        return BadImagesError(
            f"{sentence} ({count} bad {'file' if count == 1 else 'files'} in {self.folder})"
        )

    def _refuse_empty_classes(self) -> None:
        filled = set(self.targets)
        for target, name in enumerate(self.classes):
            if target not in filled:
                class_folder = self.folder / name
                raise DualLoRAError(f"{class_folder} has no readable image: add some or remove the folder")


def _refusal_of(path: Path) -> str | None:
    try:
        read_image(path)
    except DualLoRAError as error:
        return str(error)
    return None


def train_and_val(folder: str | Path) -> tuple[Path, Path | None]:
    """Finds the training and the validation folder.

    Args:
        folder: holds class folders, or ``train/`` and perhaps ``val/`` (or ``test/``) that hold them. Other
            usual names will do in any case: ``Training``, ``valid``, ``validation``, ``Test_set``.

    Returns:
        ``train/`` and ``val/`` (or ``test/``, or None where there is neither); the folder itself and None
        when it holds the class folders.

    Raises:
        DualLoRAError: the folder is missing, or it is not clear which folder is which.
    """
    folder = Path(folder)
    found = _parts(folder)
    if found is None:
        return folder, None
    if found.train is None:
        raise DualLoRAError(
            f"{folder} holds {found.held_out}/ and no train/: put the class folders to learn from into train/"
        )
    return folder / found.train, None if found.held_out is None else folder / found.held_out


def evaluation_folder(folder: str | Path) -> Path:
    """Finds the class folders to evaluate on: those in ``val/`` or ``test/`` where there is one.

    Where there is none but a ``train/``, or the folder itself is called so, a warning says that the images
    are training images.

    Raises:
        DualLoRAError: the folder is missing, or it is not clear which folder is which.
    """
    folder = Path(folder)
    found = _parts(folder)
    if found is not None and found.held_out is not None:
        return folder / found.held_out
    chosen = folder if found is None or found.train is None else folder / found.train
    if role(chosen.resolve().name) == "train":
        warnings.warn(
            f"{chosen} is a folder of training images: accuracy on images that were learned says nothing of "
            "new ones; name a folder of other images, or put them into val/ beside it",
            stacklevel=2,
        )
    return chosen


def _parts(folder: Path) -> Parts | None:
    require_folder(folder)
    found = parts_of(folder)
    if found is None or found.train is None or found.held_out is None:
        return found
    train, held_out = ((folder / name).resolve() for name in (found.train, found.held_out))
    if train.is_relative_to(held_out) or held_out.is_relative_to(train):
        raise DualLoRAError(
            f"{folder / found.train} and {folder / found.held_out} lead to the same images: what is learned "
            "cannot be tested on"
        )
    return found


def _class_folders(folder: Path) -> list[tuple[str, Path]]:
    require_folder(folder)
    found = parts_of(folder)
    if found is not None:
        raise DualLoRAError(
            f"{folder} holds {found.train or found.held_out}/ with folders in it, which is no class but a "
            "part of a data set: name the folder that holds the class folders"
        )
    # The same name can be composed or decomposed unicode, depending on the machine that made the folder.
    named = sorted((normal(entry.name), entry) for entry in folder.iterdir() if is_class_folder(entry))
    if not named:
        raise DualLoRAError(f"{folder} has no class folders: put the images into one folder a class")
    check_class_names([name for name, _ in named])
    return named
