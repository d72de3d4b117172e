"""Files that may be read: regular ones. A pipe or a device may have no end, and opening one can wait."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from duallora.errors import DualLoRAError

_KERNEL = ("/proc/", "/sys/")
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegular(DualLoRAError):
    """A path names something that is no regular file."""


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file for reading if it is a regular one; nothing waits, whatever the path names.

    Raises:
        NotRegular: it is a pipe, a socket, a device, or a file that the kernel makes up.
        OSError: it is missing, a folder, or may not be read.
    """
    _require_kind(path)  # before it is opened: opening a device can already do something
    # It may have been replaced since; without waiting, a pipe that has no writer opens at once.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_kind(path, os.fstat(descriptor).st_mode)
        _refuse_opened(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        NotRegular: it is none.
        OSError: it is missing or may not be read.
    """
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text in a regular file, its lines ended as everywhere in Python.

    Raises:
        NotRegular: it is none.
        OSError: it is missing or may not be read.
        UnicodeDecodeError: it is no text in that encoding.
    """
    text = read_regular(path).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_regular(path: str | Path) -> None:
    """Refuses a path that names no regular file, without opening it; links are followed.

    Raises:
        NotRegular: it is a pipe, a socket, a device, a file that the kernel makes up, or no name of a file.
        OSError: it is missing or a folder.
    """
    _require_kind(path)
    refuse_kernel(Path(path))


def refuse_special(folder: str, names: Iterable[str]) -> None:
    """Refuses a folder in which one of the names is neither a file nor a folder; nothing is opened.

    Raises:
        NotRegular: naming the first.
    """
    wanted = set(names)
    with os.scandir(folder) as entries:
        for entry in entries:
            # The folder itself says what an entry is; only links are looked at.
            if entry.name in wanted and not entry.is_file() and not entry.is_dir():
                with suppress(FileNotFoundError):  # a link to nothing; whoever reads it says so
                    _refuse_kind(Path(entry.path), entry.stat().st_mode)


def refuse_kernel(path: Path) -> None:
    """Refuses what lies in ``/proc`` or ``/sys``: it is made up when it is read, and some of it never ends.

    Raises:
        NotRegular: it lies there, or is a link to there.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # a loop of links; opening it says so
        return
    _refuse_place(resolved, path)


def _refuse_opened(descriptor: int, path: str | Path) -> None:
    """As `refuse_kernel`, for a file that is open: the kernel says where it lies, without a walk."""
    try:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:  # no such view of open files on this system
        refuse_kernel(Path(path))
        return
    _refuse_place(place, path)


def _refuse_place(place: Path, path: str | Path) -> None:
    if f"{place}/".startswith(_KERNEL):
        raise NotRegular(f"{path} is of the system, not a file on a disk: name another one")


def _require_kind(path: str | Path) -> None:
    if "\0" in str(path):
        raise NotRegular(f"no file can be called {path}: leave its NUL character out")
    _refuse_kind(path, Path(path).stat().st_mode)


def _refuse_kind(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise NotRegular(f"{path} is {name}, not a file: name a regular file")
