"""Injects one fault into the file operations below a folder, in process.

``sweep`` repeats an action with the fault at its first, second, ... file operation until it meets none::

    for trial in faults.sweep(start, tmp_path, lambda folder: save(folder), kind="full"):
        assert loads(trial.folder), trial

Counted are the operations that change the disk: opening for writing, writing, syncing, renaming, deleting,
making and removing folders. Reads are left alone, and so is everything outside the watched folder.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

Kind = Literal["full", "full_for_good", "interrupt", "interrupt_after", "crash", "power", "reorder"]
# full            the operation fails with ENOSPC, a write after half of its bytes; the next one works again
# full_for_good   so does every later one that needs space
# interrupt       KeyboardInterrupt before the operation; interrupt_after: once it is done
# crash           the process ends there (a write is torn), and nothing that follows has any effect
# power           the same, and what was not synced is lost: content of files, names in folders
# reorder         the same, but the latest change of a name did reach the disk before the others
KINDS: tuple[Kind, ...] = get_args(Kind)

_NEEDS_SPACE = ("open", "write", "fsync", "mkdir", "link", "symlink")


class SimulatedCrash(BaseException):
    """The process would have ended here."""


@dataclass(frozen=True)
class Trial:
    """One run of the action: with a fault at ``operation`` (None: it ran through without one)."""

    folder: Path
    operation: str | None
    error: BaseException | None
    result: Any


def sweep(
    start: Path | None,
    workspace: Path,
    action: Callable[[Path], Any],
    kind: Kind,
    *,
    first: int = 0,
    step: int = 1,
) -> Iterator[Trial]:
    """Runs ``action(folder)`` for each fault on a copy of ``start`` (None: on a folder that does not exist).

    Faults are set at operations ``first``, ``first + step``, ...; the last trial is the one without a fault.
    """
    for at in itertools.count(first, step):
        root = workspace / f"{kind}-{at}"
        folder = root / "folder"
        root.mkdir(parents=True)
        if start is not None:
            shutil.copytree(start, folder)
        error: BaseException | None = None
        result = None
        with Faults(root, kind, at) as faults:
            try:
                result = action(folder)
            except (Exception, KeyboardInterrupt, SimulatedCrash, SystemExit) as caught:
                error = caught
        yield Trial(folder, faults.fired, error, result)
        shutil.rmtree(root)
        if faults.fired is None:
            if at == first:
                raise RuntimeError("the action did not touch the watched folder")
            return


class Faults(AbstractContextManager["Faults"]):
    """While entered, file operation number ``at`` below ``root`` meets the fault (None: only counts them)."""

    def __init__(self, root: Path, kind: Kind = "full", at: int | None = None) -> None:
        self.root = root.resolve()
        self.kind = kind
        self.at = at
        self.operations: list[str] = []
        self.fired: str | None = None
        self._dead = False
        self._descriptors: dict[int, Path] = {}
        self._unsynced: set[tuple[int, int]] = set()
        self._names: list[
            tuple[Path, Callable[[], None]]
        ] = []  # changes of names not synced yet: folder, how to undo
        self._real: dict[str, Any] = {name: getattr(os, name) for name in _PATCHED}
        self._real_open = builtins.open
        self._stack = ExitStack()

    def __enter__(self) -> Faults:
        for name in _PATCHED:
            replacement = getattr(self, f"_{name}")
            self._stack.enter_context(mock.patch.object(os, name, replacement))
        self._stack.enter_context(mock.patch.object(builtins, "open", self._open_file))
        self._stack.enter_context(mock.patch.object(io, "open", self._open_file))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        if self._dead and self.kind in ("power", "reorder"):
            self._lose_unsynced()

    # --- the fault ---

    def _step(
        self, name: str, path: Path, do: Callable[[], Any], torn: Callable[[], Any] | None = None
    ) -> Any:
        if self._dead:
            raise SimulatedCrash
        operation = f"{name} {path.relative_to(self.root)}"
        self.operations.append(operation)
        later = self.kind == "full_for_good" and self.fired is not None and name in _NEEDS_SPACE
        if len(self.operations) - 1 != self.at and not later:
            return do()
        self.fired = self.fired or f"{len(self.operations) - 1}: {operation}"
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "interrupt_after":
            do()
            raise KeyboardInterrupt
        if torn is not None:
            torn()
        if self.kind in ("full", "full_for_good"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self._dead = True
        raise SimulatedCrash

    def _lose_unsynced(self) -> None:
        newest = self._names[-1:] if self.kind == "reorder" else []
        for change in reversed(self._names):
            if change not in newest:
                change[1]()
        for path in self.root.rglob("*"):
            stat = path.lstat()
            if path.is_file() and (stat.st_dev, stat.st_ino) in self._unsynced:
                os.truncate(path, 0)

    # --- which operations count ---

    def _inside(self, path: Any, dir_fd: int | None = None) -> Path | None:
        if isinstance(path, int):
            return self._descriptors.get(path)
        base = Path(f"/proc/self/fd/{dir_fd}").readlink() if dir_fd is not None else Path.cwd()
        full = base / os.fsdecode(path)
        full = full.parent.resolve() / full.name
        return full if full.is_relative_to(self.root) else None

    def _created(self, path: Path) -> None:
        self._names.append((path.parent, lambda: path.unlink(missing_ok=True)))

    def _track(self, descriptor: int, path: Path | None) -> None:
        self._descriptors.pop(descriptor, None)  # the number of a closed file is used again
        if path is not None:
            self._descriptors[descriptor] = path

    def _written(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        self._unsynced.add((stat.st_dev, stat.st_ino))

    # --- descriptors ---

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
        inside = self._inside(path, dir_fd)

        def do() -> int:
            is_new = inside is not None and not inside.exists()
            descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
            self._track(descriptor, inside)
            if inside is not None and is_new:
                self._created(inside)
            return descriptor

        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return self._step("open", inside, do) if inside is not None and writes else do()

    def _write(self, descriptor: int, data: Any) -> Any:
        path = self._descriptors.get(descriptor)
        if path is None:
            return self._real["write"](descriptor, data)
        self._written(descriptor)
        view = memoryview(data).cast("B")

        def torn() -> None:
            self._real["write"](descriptor, view[: len(view) // 2])

        return self._step("write", path, lambda: self._real["write"](descriptor, view), torn)

    def _fsync(self, descriptor: Any) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = self._descriptors.get(number)
        if path is None:
            return self._real["fsync"](number)

        def do() -> None:
            # Nothing on this disk has to survive a real power cut, so only the bookkeeping happens.
            stat = os.fstat(number)
            self._unsynced.discard((stat.st_dev, stat.st_ino))
            self._names = [change for change in self._names if change[0] != path]

        return self._step("fsync", path, do)

    def _close(self, descriptor: int) -> None:
        self._track(descriptor, None)
        self._real["close"](descriptor)

    def _open_file(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        inside = self._inside(file)
        if inside is None or not set(mode) & set("wax+"):
            return self._real_open(file, mode, *args, **kwargs)

        def do() -> _File:
            is_new = not inside.exists()
            opened = self._real_open(file, mode, *args, **kwargs)
            self._track(opened.fileno(), inside)
            if is_new:
                self._created(inside)
            self._written(opened.fileno())
            return _File(opened, inside, self)

        return self._step("open", inside, do)

    # --- names ---

    def _replace(self, source: Any, target: Any, **kwargs: Any) -> Any:
        return self._move("replace", source, target, kwargs)

    def _rename(self, source: Any, target: Any, **kwargs: Any) -> Any:
        return self._move("rename", source, target, kwargs)

    def _move(self, name: str, source: Any, target: Any, kwargs: dict[str, Any]) -> Any:
        old, new = self._inside(source), self._inside(target)
        if new is None or old is None:
            return self._real[name](source, target, **kwargs)

        def do() -> None:
            before = _content(new)
            self._real[name](source, target, **kwargs)

            def back() -> None:
                if new.is_dir():
                    new.rename(old)
                elif new.exists():
                    new.rename(old)
                    if before is not None:
                        new.write_bytes(before)

            self._names.append((new.parent, back))

        return self._step(name, new, do)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> Any:
        inside = self._inside(path, dir_fd)
        if inside is None:
            return self._real["unlink"](path, dir_fd=dir_fd)

        def do() -> None:
            before = _content(inside)
            self._real["unlink"](path, dir_fd=dir_fd)
            if before is not None:
                self._names.append((inside.parent, lambda: _restore(inside, before)))

        return self._step("unlink", inside, do)

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
        return self._plain("mkdir", path, dir_fd, lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> Any:
        return self._plain("rmdir", path, dir_fd, lambda: self._real["rmdir"](path, dir_fd=dir_fd))

    def _link(self, source: Any, target: Any, **kwargs: Any) -> Any:
        return self._plain("link", target, None, lambda: self._real["link"](source, target, **kwargs))

    def _symlink(self, source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self._plain(
            "symlink", target, None, lambda: self._real["symlink"](source, target, *args, **kwargs)
        )

    def _plain(self, name: str, path: Any, dir_fd: int | None, do: Callable[[], None]) -> Any:
        inside = self._inside(path, dir_fd)
        return do() if inside is None else self._step(name, inside, do)


_PATCHED = (
    *("open", "write", "fsync", "close", "replace", "rename", "unlink", "remove"),
    *("mkdir", "rmdir", "link", "symlink"),
)


class _File:
    """A file opened for writing; every write counts and goes to the disk at once, past the buffer."""

    def __init__(self, file: Any, path: Path, faults: Faults) -> None:
        self._file = file
        self._path = path
        self._faults = faults

    def write(self, data: Any) -> Any:
        def do() -> Any:
            written = self._file.write(data)
            self._file.flush()
            return written

        def torn() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults._written(self._file.fileno())
        return self._faults._step("write", self._path, do, torn)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _restore(path: Path, content: bytes) -> None:
    if not path.exists():
        path.write_bytes(content)
