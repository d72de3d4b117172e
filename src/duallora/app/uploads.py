"""What the browser sends: a folder of temporary copies that is emptied, and zips unpacked into it safely."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from duallora.data.images import find_files, require_folder
from duallora.errors import DualLoRAError
from duallora.storage.atomic import reason
from duallora.storage.regular import require_regular

MOST_FILES = 20_000
"""Files of a zip or a folder."""

MOST_BYTES = 4 * 1024**3
"""Bytes of a zip's files, unpacked."""

OLD = 3600
"""Seconds after which a copy that no owner needs is deleted."""

_BETWEEN = 600  # seconds between two looks for old copies
_CHUNK = 1 << 20
_SYSTEM = frozenset({"__MACOSX", "thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Found:
    """A file and where it lay: ``parts`` are the names of its folders, from the outermost, and its own."""

    path: Path
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is shown."""
        return "/".join(self.parts)


class Uploads:
    """The temporary copies of one running page; nothing outside their folder is ever deleted.

    The browser's copies are named by their content: the same picture given twice, for two classes or by two
    pages, is one file. So whoever needs copies says so (:meth:`owned_by`), and what one owner gives up stays
    while another has it.

    Args:
        folder: where they are; a new one by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="duallora-app-")) if folder is None else folder
        self.folder = self.folder.resolve()
        self._owners: list[Callable[[], Iterable[Path]]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def owned_by(self, owner: Callable[[], Iterable[Path]]) -> None:
        """Asks ``owner`` from now on which files it needs, before any is deleted."""
        self._owners.append(owner)

    def holds(self, path: Path) -> bool:
        """Whether a file is one of these copies."""
        return path.resolve().is_relative_to(self.folder)

    def take(self, path: Path, owned: set[Path]) -> bool:
        """Adds a copy to what an owner needs; gives whether it is there."""
        with self._lock:
            if not self.holds(path) or not path.is_file():
                return False
            os.utime(path)  # its hour begins anew
            owned.add(path)
            return True

    def is_old(self, path: Path) -> bool:
        """Whether nobody has taken a copy for ``OLD`` seconds; one that is gone is old."""
        try:
            return time.time() - path.stat().st_mtime > OLD
        except OSError:
            return True

    def discard(self, paths: Iterable[Path]) -> None:
        """Deletes those of the files that are copies and that no owner needs."""
        with self._lock:
            needed = {path for owner in self._owners for path in owner()}
            for path in set(paths) - needed:
                if self.holds(path):
                    _delete(path, self.folder)

    def sweep(self) -> None:
        """Deletes old copies that no owner needs: chosen in the browser, and never added."""
        found = [Path(parent) / name for parent, _, names in os.walk(self.folder) for name in names]
        self.discard(path for path in found if self.is_old(path))

    def start_sweeping(self) -> None:
        """Sweeps from now on until :meth:`close`, in a thread of its own."""

        def sweep() -> None:
            while not self._closed.wait(_BETWEEN):
                self.sweep()

        threading.Thread(target=sweep, name="duallora-sweep", daemon=True).start()

    def close(self) -> None:
        """Deletes everything."""
        self._closed.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def unpack(self, archive: Path, shown: str) -> list[Found]:
        """Unpacks a zip under names of our own, so that none in it can lead out of the folder.

        Args:
            archive: the file.
            shown: what the messages call it.

        Returns:
            Its files, sorted by name; hidden ones and those an operating system drops are left out.

        Raises:
            DualLoRAError: it is no zip, is damaged or encrypted, or unpacks to too much.
        """
        require_regular(archive)
        folder = self.folder / f"zip-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            with zipfile.ZipFile(archive) as opened:
                return _unpacked(opened, folder, shown)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, DualLoRAError) or not isinstance(error, Exception):
                raise
            raise DualLoRAError(_why_not_unpacked(shown, error)) from error


def files_of(folder: Path) -> list[Found]:
    """The files below a folder on this computer, which stay where they are.

    Raises:
        DualLoRAError: there is no such folder, or it holds too many.
    """
    try:
        require_folder(folder)
        os.scandir(folder).close()  # the walk would pass over a folder that may not be read
        paths = find_files(folder)
        outermost = folder.resolve().name
    except OSError as error:
        raise DualLoRAError(f"the folder {folder} cannot be read: {_reason(error)}.") from error
    _refuse_many(len(paths), str(folder))
    return [Found(path, (outermost, *path.relative_to(folder).parts)) for path in paths]


def named_folder(text: str) -> Path:
    """The folder that was typed; ``~`` is the own home folder, and quotation marks are those of a shell.

    Raises:
        DualLoRAError: it is in the home folder of a user who is not known.
    """
    try:
        return Path(text.strip().strip('"')).expanduser()
    except RuntimeError as error:
        raise DualLoRAError(
            f"the home folder in {text.strip()} is not known; type the path from / on."
        ) from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "its permissions do not allow it, change them or choose another folder"
    if error.errno == errno.ENAMETOOLONG:
        return "its path is too long, check it"
    return f"{error.strerror or error}, check the path"


def _why_not_unpacked(shown: str, error: Exception) -> str:
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return f"{shown} is encrypted; make the zip without a password."  # what zipfile raises then
    # Decoders raise OSError, too, but without a number.
    if isinstance(error, OSError) and error.errno is not None:
        return f"{shown} could not be unpacked: {reason(error)}."
    # Damaged archives make zipfile and the decoders raise nearly anything (zlib.error, LZMAError, ...).
    return f"{shown} is damaged or no zip archive ({error}); make it again."


def _delete(path: Path, top: Path) -> None:
    with suppress(OSError):
        path.unlink()
    if path.parent != top:
        with suppress(OSError):  # its folder, once it is empty
            path.parent.rmdir()


def _unpacked(archive: zipfile.ZipFile, folder: Path, shown: str) -> list[Found]:
    entries = [(entry, _parts(entry)) for entry in archive.infolist() if not entry.is_dir()]
    entries = [(entry, parts) for entry, parts in entries if not _is_system(parts)]
    _refuse_many(len(entries), shown)
    found, left = [], MOST_BYTES
    for number, (entry, parts) in enumerate(entries):
        if not parts or ".." in parts or stat.S_ISLNK(entry.external_attr >> 16):
            raise DualLoRAError(
                f"{shown} has an entry {entry.filename!r} that leads out of it; make the zip again from the "
                "images alone."
            )
        # bzip2 and LZMA inflate a chunk without a bound: a kilobyte to gigabytes.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DualLoRAError(
                f"{shown} is packed with {_method(entry.compress_type)}; make the zip again with the usual "
                "method, deflate."
            )
        path = folder / f"{number:05d}{PurePosixPath(parts[-1]).suffix[:10]}"
        # What the directory says of sizes is not believed: a small zip can unpack to a full disk.
        with archive.open(entry) as source, path.open("wb") as target:
            while chunk := source.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise DualLoRAError(
                        f"{shown} unpacks to more than {MOST_BYTES // 1024**3} GB; split it into several."
                    )
                target.write(chunk)
        found.append(Found(path, (PurePosixPath(shown).stem, *parts)))
    return sorted(found, key=lambda each: each.parts)


def _method(number: int) -> str:
    return {12: "bzip2", 14: "LZMA", 93: "Zstandard"}.get(number, f"method {number}")


def _parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    names = entry.filename.replace("\\", "/").split("/")
    return tuple(name for name in names if name not in ("", "."))


def _is_system(parts: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return hidden or any(part in _SYSTEM or part.lower() in _SYSTEM for part in parts)


def _refuse_many(count: int, shown: str) -> None:
    if count > MOST_FILES:
        raise DualLoRAError(
            f"{shown} holds {count:,} files, more than {MOST_FILES:,}; split it into several."
        )
