"""Files that are replaced whole or not at all, and the lock that keeps a folder to one writer."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.storage.regular import open_regular

_LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_CHUNK = 1 << 23
_YOUNG = 1.0  # seconds


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that, whatever happens, it holds the old bytes or the new ones.

    Raises:
        DualLoRAError: the disk is full or the folder not writable; the file is as it was.
    """
    path = path.resolve()  # the target of a link is replaced, not the link
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # /dev/stdout and its like cannot be replaced, and must not be
            return
        _remove_abandoned(path)
        replace_file(path, [data])
        sync_folder(path.parent)
    except OSError as error:
        raise DualLoRAError(f"{path} could not be written: {reason(error)}.") from error


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of killed writers; the caller holds :func:`exclusive` on the folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder's write lock, without waiting for it.

    A folder that did not exist is created, and removed again when nothing was written into it. The lock dies
    with the process, so a killed writer never blocks the next one.

    Raises:
        DualLoRAError: another process holds the lock, or the folder cannot be created or written.
    """
    created: list[Path] = []
    try:
        descriptor = _acquire(folder, created)
    except BaseException as error:
        _remove_empty(created)
        if isinstance(error, OSError):
            raise DualLoRAError(f"{folder} cannot be written: {reason(error)}.") from error
        raise
    try:
        yield
    finally:
        try:
            with suppress(
                OSError
            ):  # an empty folder left behind is not worth hiding what happened in the body
                if created and [entry.name for entry in folder.iterdir()] == [_LOCK]:
                    (folder / _LOCK).unlink()
                    _remove_empty(created)
        finally:
            # Closing alone is not enough: forked loader processes may hold a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def replace_file(path: Path, chunks: Iterable[bytes]) -> str:
    """Writes a temporary file beside ``path``, syncs it and renames it to ``path``; returns its sha256."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    digest = hashlib.sha256()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with suppress(OSError):  # a file system without locks; nothing is taken for abandoned there
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for chunk in chunks:
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the creations, renames and deletions in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # file systems that cannot sync a folder say so with these
            raise
    finally:
        os.close(descriptor)


def chunks_of(path: Path) -> Iterator[bytes]:
    """Reads a file piece by piece."""
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()


def reason(error: OSError) -> str:
    """Says in words for the user, with the remedy, why a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full, free some space and try again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "it is not writable, change its permissions or choose another folder"
    return f"{error.strerror or error}"


def _acquire(folder: Path, created: list[Path]) -> int:
    """Opens and locks ``.lock``; folders made on the way are added to ``created``, outermost first."""
    while True:
        for path in reversed([folder, *folder.parents]):
            if not path.exists():
                path.mkdir(exist_ok=True)
                created.append(path)
                sync_folder(path.parent)
        try:
            descriptor = _open_lock(folder / _LOCK)
        except FileNotFoundError:
            continue  # another writer removed its empty folder just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that its holder deleted meanwhile protects nothing.
            if os.path.samestat(os.fstat(descriptor), (folder / _LOCK).lstat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise DualLoRAError(
                f"another process is writing to {folder}; wait until it has finished, then try again."
            ) from None
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Deletes temporary files of killed writers of this file; those of living ones are locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                # A writer locks its file a moment after it has made it.
                if time.time() - os.fstat(descriptor).st_mtime > _YOUNG:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            finally:
                os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Opens the lock file and follows no link, which another user could have put in its place.

    Raises:
        DualLoRAError: it is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = None
    try:
        descriptor = os.open(path, flags, 0o666)
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        regular = False
    if descriptor is None or not regular:
        if descriptor is not None:
            os.close(descriptor)
        raise DualLoRAError(f"{path} is not the lock file that duallora makes there; remove it.")
    return descriptor


def _remove_empty(created: list[Path]) -> None:
    with suppress(OSError):
        for path in reversed(created):
            path.rmdir()
