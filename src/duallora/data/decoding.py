"""Images of strangers are decoded in processes that can be killed, within bounds of time and memory.

The list of encodings in :mod:`duallora.data.encodings` keeps out what is known to be costly. These bounds
hold for what nobody has thought of: a decoder that hangs, swells or crashes takes none of the server with it.
"""

from __future__ import annotations

import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from PIL import Image

from duallora.data import decoder_process
from duallora.data.decoder_process import ANSWER, PIXELS, REQUEST, TOO_MANY
from duallora.data.images import MAX_PIXELS, TooManyPixels
from duallora.errors import DualLoRAError

Read = Callable[[Path], Image.Image]
"""Reads an image file, as :func:`read_image` does."""

_BASE_BYTES = 1 << 30  # the interpreter, Pillow, numpy, the file, metadata
_PIXEL_BYTES = 20  # Pillow keeps four bytes a pixel; laying transparency on white takes four such images
_BASE_SECONDS = 2.0
_PIXELS_A_SECOND = 10_000_000  # the slowest decoders of the list reach several times that
_WALL = 4.0  # so many times the seconds of CPU may pass on a busy machine
_START = 60.0  # seconds that a process may take to start
_CHUNK = 1 << 20


class DecoderEnded(DualLoRAError):
    """Decoding an image took more time or memory than is given to one, or the decoder crashed."""


class Decoders:
    """A few processes that decode, each one image at a time; they start when they are needed.

    Threads may share it; a call waits while all processes are busy.

    Args:
        processes: how many there are at most.
        max_pixels: images with more are refused; memory and time of an image follow from it.
    """

    def __init__(self, processes: int, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = min(max_pixels, MAX_PIXELS)
        self.memory = _BASE_BYTES + _PIXEL_BYTES * self.max_pixels
        self.seconds = _BASE_SECONDS + self.max_pixels / _PIXELS_A_SECOND
        self._idle: queue.LifoQueue[_Decoder] = queue.LifoQueue()
        self._all = [_Decoder(self.memory) for _ in range(processes)]
        self._closed = threading.Event()
        for each in self._all:
            self._idle.put(each)

    def decode(self, data: bytes, name: str, until: float | None = None) -> Image.Image:
        """Decodes the bytes of an image file, as :func:`duallora.data.images.decode_image`.

        Args:
            data: of the file.
            name: what the messages call it.
            until: moment of ``time.monotonic`` at which it is given up.

        Raises:
            TooManyPixels: the image is too large.
            DecoderEnded: it takes too much time or memory.
            DualLoRAError: it is not a readable image, or :meth:`close` was called.
        """
        return self._ask(False, data, name, until)

    def read(self, path: Path) -> Image.Image:
        """Decodes an image file, as :func:`duallora.data.images.read_image`; raises as :meth:`decode`."""
        return self._ask(True, os.fsencode(path), str(path), None)

    def close(self) -> None:
        """Kills the processes; calls that wait for one end with an error."""
        self._closed.set()
        for each in self._all:
            each.close()

    def _ask(self, is_path: bool, data: bytes, name: str, until: float | None) -> Image.Image:
        own = self._next(until, name)
        try:
            wall = self.seconds * _WALL
            end = time.monotonic() + wall
            request = (is_path, data, name, self.max_pixels, self.seconds)
            return own.ask(*request, end if until is None else min(end, until))
        finally:
            self._idle.put(own)

    def _next(self, until: float | None, name: str) -> _Decoder:
        while not self._closed.is_set():
            with suppress(queue.Empty):
                return self._idle.get(timeout=0.2)
            if until is not None and time.monotonic() > until:
                raise DecoderEnded(_ended(name))
        raise DualLoRAError(f"{name} is not decoded: the program is ending")


class _Decoder:
    """One process, started anew when it has ended."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._closed = False

    def ask(
        self, is_path: bool, data: bytes, name: str, most: int, seconds: float, until: float
    ) -> Image.Image:
        """One question and its answer; a process that does not give it in time is killed."""
        shown = os.fsencode(name)
        head = REQUEST.pack(is_path, most, seconds, len(shown), len(data))
        try:
            before, process = self._process, self._started()
            if process is not before:  # what it imports is none of the image's time
                until += _START
            _send(process, head + shown, until)
            _send(process, data, until)
            what, width, height = ANSWER.unpack(_receive(process, ANSWER.size, until))
            size = width * height * 3 if what == PIXELS else height
            found = _receive(process, size, until)
        except (OSError, EOFError, TimeoutError) as error:
            self.kill()
            raise DecoderEnded(_ended(name)) from error
        except BaseException:
            self.kill()  # it would answer the next question with what is left of this one
            raise
        if what == PIXELS:
            pixels: Any = found
            return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
        sentence = found.decode("utf-8")
        raise TooManyPixels(sentence) if what == TOO_MANY else DualLoRAError(sentence)

    def close(self) -> None:
        """Ends the process, whatever it does, for good."""
        with self._starting:
            self._closed = True
        self.kill()

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._starting:
            if self._closed:
                raise EOFError
            if self._process is None or self._process.poll() is not None:
                self._release()
                self._process = self._start()
            return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: a folder named PIL where the program was started is none of its modules.
        command = [sys.executable, "-P", "-m", decoder_process.__name__, str(self.memory)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for the server, which ends what it has begun
        )
        for stream in (process.stdin, process.stdout):
            os.set_blocking(_descriptor(stream), False)
        return process

    def _release(self) -> None:
        """Closes the streams of a process that has ended."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()


def _environment() -> dict[str, str]:
    """Finds this package wherever it was found here; one thread is enough for numpy."""
    home = str(Path(__file__).parents[2])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}


def _send(process: subprocess.Popen[bytes], data: bytes, until: float) -> None:
    rest, target = memoryview(data), _descriptor(process.stdin)
    while rest:
        _wait(target, select.POLLOUT, until)
        with suppress(BlockingIOError):
            rest = rest[os.write(target, rest[:_CHUNK]) :]


def _receive(process: subprocess.Popen[bytes], size: int, until: float) -> bytearray:
    found, source = bytearray(size), _descriptor(process.stdout)
    view, place = memoryview(found), 0
    while place < size:
        _wait(source, select.POLLIN, until)
        part = os.readv(source, [view[place : place + _CHUNK]])
        if not part:
            raise EOFError
        place += part
    return found


def _descriptor(stream: IO[bytes] | None) -> int:
    if stream is None or stream.closed:
        raise EOFError
    return stream.fileno()


def _wait(descriptor: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(until - time.monotonic(), 0) * 1000):
        raise TimeoutError


def _ended(name: str) -> str:
    return (
        f"{name} takes more time or memory to decode than an image is given: save it as PNG or JPEG, or make "
        "it smaller"
    )
