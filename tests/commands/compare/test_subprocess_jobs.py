"""Runs as processes: in order, at the same time, and none that outlives an interruption."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Called
from compare_tools import (
    order_of,
    read,
    rows_of,
)

from duallora.commands.subprocess_jobs import Job, gpus, run_jobs


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Job]]:
    """Makes jobs whose process is a shell that runs a few words, in a folder of its own."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ncd "$(dirname "$0")"\nshift 2\neval "$1"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    number = itertools.count()
    yield lambda text: Job(f"job {(n := next(number))}", (text,), tmp_path / "logs" / f"{n}.log")


def test_jobs_run_in_order_and_say_how_they_end(stub: Callable[[str], Job], tmp_path: Path) -> None:
    jobs = [stub("echo one; echo 1 >> order"), stub("echo why it failed >&2; echo; exit 3"), stub("exit 1")]
    jobs.append(stub("echo 2 >> order"))
    said: list[str] = []
    assert run_jobs(jobs, 1, said.append) == jobs[1:3]
    assert (tmp_path / "order").read_text() == "1\n2\n"
    assert jobs[0].log.read_text() == "one\n"
    assert said[0] == "job 0: started, 3 more to start"
    assert said[1].startswith("job 0: finished in ")
    assert said[3] == f"job 1: failed, why it failed ({jobs[1].log})"
    assert said[5] == f"job 2: failed, see {jobs[2].log}"
    assert run_jobs([], 2, said.append) == []


def test_two_jobs_run_at_a_time_and_share_the_threads(
    stub: Callable[[str], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    # Each of the first two waits for the other; the third would see neither's file if it began with them.
    wait = "i=0; while [ ! -e {other} ] && [ $i -lt 6000 ]; do sleep 0.05; i=$((i+1)); done; [ -e {other} ]"
    first = stub("touch a; echo $OMP_NUM_THREADS; " + wait.format(other="b"))
    second = stub("touch b; " + wait.format(other="a"))
    third = stub("[ -e a ] && [ -e b ]")
    assert run_jobs([first, second, third], 2, lambda _: None) == []
    assert first.log.read_text() == "4\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    last = stub("echo $OMP_NUM_THREADS")
    assert run_jobs([last], 2, lambda _: None) == []
    assert last.log.read_text() == "3\n"


def test_every_run_sees_one_gpu_the_one_with_fewest_runs(
    stub: Callable[[str], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    assert gpus() == ("4", "GPU-7")
    wait = "i=0; while [ ! -e {other} ] && [ $i -lt 6000 ]; do sleep 0.05; i=$((i+1)); done"
    first = stub("echo $CUDA_VISIBLE_DEVICES; touch a; " + wait.format(other="c"))
    second = stub("echo $CUDA_VISIBLE_DEVICES; " + wait.format(other="a"))
    third = stub("echo $CUDA_VISIBLE_DEVICES; touch c")  # begins when the second has ended
    assert run_jobs([first, second, third], 2, lambda _: None, gpus()) == []
    assert [job.log.read_text() for job in (first, second, third)] == ["4\n", "GPU-7\n", "GPU-7\n"]
    plain = stub("echo $CUDA_VISIBLE_DEVICES")
    assert run_jobs([plain], 1, lambda _: None) == []
    assert plain.log.read_text() == "4, GPU-7\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, signal.SIGTERM])
def test_no_process_outlives_an_interruption(
    stub: Callable[[str], Job], tmp_path: Path, error: type[BaseException] | signal.Signals
) -> None:
    jobs = [
        stub("echo $$ > first; exec sleep 600"),
        stub("echo $$ > second; exec sleep 600"),
        stub("touch third"),
    ]

    def written(number: Path) -> bool:
        return number.exists() and number.read_text().endswith("\n")

    def interrupt(said: str) -> None:
        if said.startswith("job 1"):
            end = time.monotonic() + 300
            while not all(written(tmp_path / name) for name in ("first", "second")):
                assert time.monotonic() < end
                time.sleep(0.02)
            if isinstance(error, signal.Signals):
                signal.raise_signal(error)
                raise AssertionError("the signal was ignored")
            raise error

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if isinstance(error, signal.Signals) else error):
        run_jobs(jobs, 2, interrupt)
    assert signal.getsignal(signal.SIGTERM) == handler
    for name in ("first", "second"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
    assert not (tmp_path / "third").exists()


@pytest.mark.process
def test_runs_are_processes_of_their_own(real: tuple[Path, Called]) -> None:
    folder, called = real
    out = folder / "out"
    assert called.code == 2
    assert "first_adapted_layer must be below" in (out / "logs" / "deep-0.log").read_text()
    assert set(order_of(rows_of(out))) == {"joint"}
    assert "report: out/runs/joint-0/report.md" in (out / "logs" / "joint-0.log").read_text()
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (out / "compare.html").read_text()
    results = read(out / "runs" / "joint-0" / "results.json")
    assert [len(task["classes"]) for task in results["tasks"]] == [4]
    assert results["config"]["method"]["epochs"] == 1
