"""Processes that prepare images ahead of the model, started once and kept."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from duallora.data.image_memory import Bytes, ImageMemory, RegionName
from duallora.data.source import Source
from duallora.errors import DualLoRAError

PIECE = 8
"""Most images that a worker is given at a time."""

_SLOTS = 32  # pieces that are under way or wait for the model
_HEADER = 4096  # bytes before the slots; they begin with the number of the pass
_LARGEST = 2**24  # bytes of a data set that is sent; a larger one is inherited by new forks


class Sent(NamedTuple):
    """Where a worker finds a data set that came after its start."""

    region: RegionName
    place: int
    size: int


class Piece(NamedTuple):
    """What a worker has to do.

    Attributes:
        chunk: number of the batch that the images are part of.
        row: of the first image in it.
        source: number of the data set.
        epoch: as for ``Source.write``.
        positions: of the images.
    """

    chunk: int
    row: int
    source: int
    epoch: int | None
    positions: tuple[int, ...]


class Done(NamedTuple):
    """What has come of a piece.

    Attributes:
        piece: the piece.
        pixels: views (n, height, width, 3), valid until the next piece is submitted.
        row: of the image that could not be read.
        error: why.
    """

    piece: Piece
    pixels: Bytes
    row: int
    error: Exception | None


@dataclass
class Library:
    """The open data sets by their number, and the memory that they keep images in."""

    memory: ImageMemory
    sources: dict[int, Source]
    regions: dict[int, RegionName]


class Workers:
    """Processes that read from one queue and write views into memory that is shared with them.

    They are forks, which inherit the data sets that are open when they start; later ones they are sent.
    Where the system has no safe fork, threads take their place.

    Attributes:
        count: how many.
        view: bytes of the largest view.
    """

    def __init__(self, count: int, library: Library, view: int) -> None:
        """Starts them.

        Args:
            count: how many.
            library: what they read.
            view: bytes of the largest view.
        """
        self.count, self.view, self._library = count, view, library
        self._slots = mmap.mmap(-1, _HEADER + _SLOTS * PIECE * view)
        self._free = list(range(_SLOTS))
        self._pieces: dict[int, Piece] = {}  # under way, by slot
        self._known: dict[int, Sent | None] = dict.fromkeys(library.sources)
        self._passes = np.frombuffer(self._slots, np.int64, 1)
        forks = forking()
        context: Any = multiprocessing.get_context("fork" if forks else None)
        lock = context.Lock()
        receive, self._tasks = context.Pipe(duplex=False)
        self._results: list[Connection] = []
        self._started: list[Any] = []
        others: list[Connection] = [self._tasks]
        for _ in range(count):
            result, send = context.Pipe(duplex=False)
            arguments = (receive, lock, send, self._slots, view, library, others if forks else [])
            made = (
                context.Process(target=_work, args=arguments, daemon=True)
                if forks
                else threading.Thread(target=_read, args=arguments[:-1], daemon=True)
            )
            with _uninterrupted() if forks else nullcontext():
                made.start()
            self._started.append(made)
            self._results.append(result)
            if forks:
                send.close()  # held by its process alone, so that the end of that is seen
        if forks:
            receive.close()
        self.close = weakref.finalize(self, _end, os.getpid(), self._tasks, self._results, self._started)

    def reads(self, number: int) -> bool:
        """Whether images of a data set are under way."""
        return any(piece.source == number for piece in list(self._pieces.values()))

    def learn_of(self, number: int) -> bool:
        """Makes a data set known to the workers; False if only new ones can know it."""
        if number in self._known:
            return True
        if not forking():
            self._known[number] = None
            return True
        pickled = _pickled(self._library.sources[number])
        name = self._library.regions[number]
        region = self._library.memory[name]
        place = None if pickled is None else region.take(len(pickled), image=False)
        if pickled is None or place is None:
            return False
        region.at(place, len(pickled))[:] = np.frombuffer(pickled, np.uint8)
        self._known[number] = Sent(name, place, len(pickled))
        return True

    def begin(self) -> None:
        """Begins a pass: what is still under way is of no use to anybody, and is waited for."""
        self._passes[0] += 1
        while self._pieces:
            for _ in self.receive(block=True):
                pass

    def submit(self, piece: Piece) -> bool:
        """Hands a piece over; False while as much is under way as there is room for."""
        if not self._free:
            return False
        slot = self._free.pop()
        self._pieces[slot] = piece
        alive = tuple(number for number in self._known if number in self._library.sources)
        self._tasks.send((int(self._passes[0]), slot, piece, self._known[piece.source], alive))
        return True

    def receive(self, *, block: bool) -> Iterator[Done]:
        """The pieces that are back.

        Args:
            block: wait for one at least.

        Raises:
            DualLoRAError: a worker has ended.
        """
        for connection in wait(self._results, None if block else 0):
            try:
                slot, row, error = cast("Connection", connection).recv()
            except (EOFError, OSError) as ended:
                raise DualLoRAError(
                    "a process that prepares images has ended unexpectedly, perhaps for want of memory; "
                    "lower --workers or --image-memory, or start again."
                ) from ended
            piece = self._pieces.pop(slot)
            shape = self._library.sources[piece.source].shape
            pixels = _slot(self._slots, slot, self.view, len(piece.positions), shape)
            yield Done(piece, pixels, row, error)
            self._free.append(slot)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits; a process that is forked now never sees it, not even before its first line."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forking() -> bool:
    """Whether workers are forks: on Linux, and not inside a process that may have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def _slot(slots: mmap.mmap, slot: int, view: int, count: int, shape: tuple[int, ...]) -> Bytes:
    size = count * int(np.prod(shape))
    start = _HEADER + slot * PIECE * view
    found: Bytes = np.frombuffer(slots, np.uint8, size, start).reshape(count, *shape)
    return found


def _work(
    tasks: Connection,
    lock: Any,
    results: Connection,
    slots: mmap.mmap,
    view: int,
    library: Library,
    others: list[Connection],
) -> None:
    """What a fork does; it ends with the process that started it, whose end of the queue is closed then."""
    for connection in others:
        connection.close()
    # Ctrl-C goes to every process of the terminal: the first one says what is to be done. It is blocked
    # since the fork; what the worker itself starts shall not inherit that it is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the pool of the process it was forked from is not there
    _read(tasks, lock, results, slots, view, library)


def _read(
    tasks: Connection, lock: Any, results: Connection, slots: mmap.mmap, view: int, library: Library
) -> None:
    passes = np.frombuffer(slots, np.int64, 1)
    own: dict[int, Source] = {}
    while True:
        with lock:
            try:
                number, slot, piece, sent, alive = tasks.recv()
            except (EOFError, OSError):
                return
        for gone in [known for known in own if known not in alive]:
            del own[gone]
        row = 0
        error: Exception | None = None
        try:
            source = own.get(piece.source)
            if source is None:
                source = library.sources[piece.source] if sent is None else _received(sent, library)
                own[piece.source] = source
            out = _slot(slots, slot, view, len(piece.positions), source.shape)
            for row, position in enumerate(piece.positions):
                if passes[0] != number:
                    break  # nobody waits for it any more
                source.write(position, piece.epoch, out[row])
        except Exception as raised:
            error = _portable(raised)
        try:
            results.send((slot, row, error))
        except OSError:
            return


def _received(sent: Sent, library: Library) -> Source:
    region = library.memory[sent.region]
    source: Source = pickle.loads(region.at(sent.place, sent.size).data)
    source.region = region
    return source


def _portable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if type(copy) is type(error) and str(copy) == str(error) else RuntimeError(str(error))


class _Sink:
    """A file that takes so many bytes and no more."""

    def __init__(self) -> None:
        self.parts, self.size = list[bytes](), 0

    def write(self, part: Any) -> int:
        self.size += memoryview(part).nbytes
        if self.size > _LARGEST:
            raise OverflowError
        self.parts.append(bytes(part))
        return len(part)


def _pickled(source: Source) -> bytes | None:
    """The source as bytes, or None where it is too large or cannot be sent."""
    sink = _Sink()
    try:
        pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL).dump(source)
    except Exception:  # whatever a data set of the user's raises
        return None
    return b"".join(sink.parts)


def _end(owner: int, tasks: Connection, results: list[Connection], started: list[Any]) -> None:
    if os.getpid() != owner:
        return  # a fork of somebody else's, which ends
    tasks.close()
    for each in started:
        if isinstance(each, threading.Thread):
            continue  # it ends by the queue that is closed
        each.terminate()
        each.join()
    for connection in results:
        connection.close()
