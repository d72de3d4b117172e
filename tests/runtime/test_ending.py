"""What is asked to end ends, in order if it can, and leaves no temporary file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duallora.runtime.ending import TERMINATED
from duallora.storage.atomic import write_atomic

WRITING = """
import sys, time
from pathlib import Path
from duallora import cli
from duallora.storage import atomic

def slow(descriptor):
    print("writing", flush=True)
    time.sleep(600)

atomic.os.fsync = slow
cli._dispatch = lambda words: atomic.write_atomic(Path(words[0]), b"x" * 100_000)
sys.exit(cli.main(sys.argv[1:]))
"""
FORKING = """
import os, signal, sys, time
from duallora.runtime.ending import ending_in_order
with ending_in_order():
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        os.write(told, b"x")  # Python drops signals that come before a fork is done
        time.sleep(600)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
STUCK = """
import sys, threading, time
from pathlib import Path
from duallora.runtime.ending import LastMoment
threading.Thread(target=time.sleep, args=(600,)).start()
LastMoment(lambda: Path(sys.argv[1]).write_text("tidy"), seconds=0.5).begin(7)
"""


def started(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_command_that_writes_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    process = started(WRITING, str(tmp_path / "old"))
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == TERMINATED
    assert err == "duallora: asked to end; every saved file is whole.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
    process = started(WRITING, str(tmp_path / "a.pt2"))
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (left,) = tmp_path.iterdir()
    os.utime(left, (1, 1))
    write_atomic(tmp_path / "a.pt2", b"other")
    assert left.exists()  # its writer lives
    process.kill()
    process.communicate()
    (tmp_path / ".b.pt2.0123456789abcdef.tmp").write_text("of another file")
    write_atomic(tmp_path / "a.pt2", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.pt2.0123456789abcdef.tmp", "a.pt2"]


def test_a_process_that_was_forked_ends_without_the_handlers_of_its_parent() -> None:
    process = started(FORKING)
    out, err = process.communicate(timeout=120)
    assert (out.strip(), err) == (str(TERMINATED), "")


def test_the_last_moment_comes_whatever_threads_do(tmp_path: Path) -> None:
    process = started(STUCK, str(tmp_path / "tidy"))
    begin = time.monotonic()
    assert process.wait(120) == 7 and time.monotonic() - begin < 60
    assert (tmp_path / "tidy").read_text() == "tidy"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_signal_that_somebody_handles_is_left_alone(handler: object) -> None:
    from duallora.runtime.ending import ending_in_order

    before = signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    try:
        with ending_in_order():
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
