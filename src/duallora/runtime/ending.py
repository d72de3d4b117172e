"""The end of a process: asked for by a signal, it comes in order, and it comes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a command that was asked to end, as a shell reports it."""

SECONDS = 8.0
"""After which a server ends whatever its threads do."""


class Terminated(BaseException):
    """The process was asked to end; no handler of errors may take it for one."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated` in the main thread, so that temporary files are deleted.

    A signal that somebody else handles, or that is ignored, stays as it is; so does everything in a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminating(os.getpid()))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LastMoment:
    """Ends the process after a while, whatever its threads do, unless it has ended by itself.

    Args:
        tidy: what has to be done before, shortly; whatever it raises is left at that.
        seconds: how long it waits.
    """

    def __init__(self, tidy: Callable[[], None] = lambda: None, seconds: float = SECONDS) -> None:
        self.tidy, self.seconds = tidy, seconds
        self._begun = threading.Lock()

    def begin(self, code: int = 0) -> None:
        """Begins to wait, once; ``code`` is the exit code then."""
        if self._begun.acquire(blocking=False):
            timer = threading.Timer(self.seconds, self._end, (code,))
            timer.daemon = True
            timer.start()

    def _end(self, code: int) -> None:
        with suppress(Exception):
            self.tidy()
        os._exit(code)


def watched(server: Any, last: LastMoment) -> Any:
    """A uvicorn server whose end, once a signal asks for it, comes in time.

    Args:
        server: whose ``handle_exit`` gets the signals.
        last: begins with the first of them.
    """
    handle: Callable[[int, FrameType | None], None] = server.handle_exit

    def handle_exit(number: int, frame: FrameType | None) -> None:
        last.begin()
        handle(number, frame)

    server.handle_exit = handle_exit
    return server


def _terminating(owner: int) -> Callable[[int, FrameType | None], None]:
    """The handler of one process: one that it forks ends as if there were none."""

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        os._exit(TERMINATED)

    return terminate
