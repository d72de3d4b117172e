"""Which file a path in a user's table means, however it is spelled."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from duallora.streams.names import normal


class TablePaths:
    """Looks paths up below a folder; every folder is read once.

    Args:
        root: folder that the paths count from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._inside: dict[str, dict[str, str]] = {}

    def find(self, text: str) -> tuple[str, Path] | None:
        """The file that a path means.

        Backslashes are read as slashes where no file has them in its name, and composed unicode finds
        decomposed.

        Returns:
            The path with slashes and composed letters, to be shown, and the file; None where there is none.
        """
        spellings = [text, text.replace("\\", "/")] if "\\" in text else [text]
        for spelling in spellings:
            file = self._file(spelling)
            if file is not None:
                return normal(spelling), file
        return None

    @staticmethod
    def identity(file: Path) -> str:
        """What is the same for all spellings of a path, and for all links to a file."""
        return os.path.realpath(file)

    def _file(self, text: str) -> Path | None:
        *folders, name = PurePosixPath(text).parts or ("",)
        place = self.root
        for part in folders:
            step = self._step(place, part)
            if step is None:
                return None
            place = step
        found = self._step(place, name)
        return None if found is None or found.is_dir() else found

    def _step(self, place: Path, part: str) -> Path | None:
        """An entry of a folder, by its name as it is or in another form of unicode."""
        if part in ("/", "//", ".."):
            return place / part
        inside = self._entries(place)
        if part in inside:
            return place / inside[part]
        other = inside.get(f"/{normal(part)}")
        return None if other is None else place / other

    def _entries(self, place: Path) -> dict[str, str]:
        key = str(place)
        if key not in self._inside:
            try:
                with os.scandir(place) as found:
                    names = sorted(entry.name for entry in found)
            except OSError:  # no folder, or none that may be read
                names = []
            # A slash is in no name: the composed forms stand beside the names as they are.
            self._inside[key] = {f"/{normal(name)}": name for name in names} | {n: n for n in names}
        return self._inside[key]
