"""Requests that arrive together share a forward pass."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from duallora.outputs import Prediction

_LAST_PASS = 3.0  # seconds that the end waits for answers that nobody may be waiting for
MOST_IMAGES = 64
"""Images of one forward pass, unless a single request has more."""


class Model(Protocol):
    """What answers requests: one generation of a saved model."""

    @property
    def generation(self) -> str:
        """Names it."""

    @property
    def about(self) -> dict[str, Any]:
        """What it holds, as ``duallora inspect --json`` says it."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image as the model takes it (3, H, W)."""

    def answer(self, images: Tensor, top: int) -> list[Prediction]:
        """What is on each of the images (n, 3, H, W), with ``top`` classes."""


@dataclass(frozen=True)
class _Job:
    model: Model
    images: Tensor
    top: int
    answer: Future[list[Prediction]] = field(default_factory=Future)


class Batcher:
    """One thread that computes; while it does, requests gather for the next pass.

    Nothing waits for company: a request that comes alone is answered alone. Images of other requests never
    enter an answer; how many there were moves its last digits, as the batch size does anywhere.

    Args:
        observe: gets the number of images of every pass.
    """

    def __init__(self, observe: Callable[[int], None] = lambda images: None) -> None:
        self._observe = observe
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="duallora-forward", daemon=True)
        self._thread.start()

    def submit(self, model: Model, images: Tensor, top: int) -> Future[list[Prediction]]:
        """Asks ``model`` about images (n, 3, H, W); cancelling the answer takes the request back.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        job = _Job(model, images, top)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Answers what has been submitted, as far as a few seconds go, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_LAST_PASS)

    def _work(self) -> None:
        while jobs := self._next():
            running = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if running:
                self._answer(running)
            del jobs, running  # an idle thread must not keep images, nor a generation that was replaced

    def _next(self) -> list[_Job]:
        """The jobs of the next pass, all for one model; empty when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            jobs: list[_Job] = []
            images = 0
            while self._jobs and (not jobs or self._jobs[0].model is jobs[0].model):
                images += len(self._jobs[0].images)
                if jobs and images > MOST_IMAGES:
                    break
                jobs.append(self._jobs.popleft())
            return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        try:  # whatever fails in here must not end the only thread that computes
            images = torch.cat([job.images for job in jobs]) if len(jobs) > 1 else jobs[0].images
            self._observe(len(images))
            found = jobs[0].model.answer(images, max(job.top for job in jobs))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            for job in jobs:  # whatever is wrong with one of them is none of the others' business
                self._answer([job])
            return
        start = 0
        for job in jobs:
            job.answer.set_result(found[start : start + len(job.images)])
            start += len(job.images)
