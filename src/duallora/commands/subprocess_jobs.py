"""Runs of a comparison as processes of their own: memory and speed of one are not those of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: For messages.
        words: Arguments of ``duallora``.
        log: File for what it prints.
    """

    name: str
    words: tuple[str, ...]
    log: Path


def run_jobs(
    jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], devices: Sequence[str] = ()
) -> list[Job]:
    """Runs all jobs, some at a time, and says how each ended.

    Args:
        jobs: In the order in which they start.
        at_once: Number of processes; they share the processor's threads.
        tell: Takes one line when a job starts or ends.
        devices: GPUs by their name for CUDA; a process sees the one that has the fewest others. Without any,
            every process sees what this one does.

    Returns:
        Those that failed.
    """
    waiting, running, failed = list(jobs), dict[subprocess.Popen[bytes], tuple[Job, float]](), []
    placed: dict[subprocess.Popen[bytes], str] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                used = [placed[process] for process in running if process in placed]
                device = min(devices, key=used.count) if devices else None
                process = _start(job, at_once, device)
                running[process] = (job, time.monotonic())
                if device is not None:
                    placed[process] = device
                tell(f"{job.name}: started, {len(waiting)} more to start")
            done = next((process for process in running if process.poll() is not None), None)
            if done is None:
                time.sleep(0.2)
                continue
            job, start = running.pop(done)
            if done.returncode:
                failed.append(job)
                tell(f"{job.name}: failed, {_last_line(job.log)}")
            else:
                tell(f"{job.name}: finished in {time.monotonic() - start:.0f} s")
    finally:  # after Ctrl-C, kill or an error here, no process goes on by itself; each can be resumed
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def gpu_for_each(device: str, devices: int, jobs: int) -> tuple[str, ...]:
    """The GPUs that runs at a time take, one each; none where they run elsewhere, take several, or are one.

    Args:
        device: kind that a run computes on.
        devices: how many a run takes.
        jobs: runs at a time.
    """
    return gpus() if device == "cuda" and devices == 1 and jobs > 1 else ()


def gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return tuple(name.strip() for name in visible.split(",") if name.strip())
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def _start(job: Job, at_once: int, device: str | None) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "duallora", *job.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()} ({log})" if lines else f"see {log}"
