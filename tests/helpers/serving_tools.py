"""A served tiny model: images as bytes, a running server on a free port, and what goes to it."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from tiny import IMAGE

from duallora.outputs import Prediction
from duallora.serving.app import Source, create_app
from duallora.serving.limits import Limits


def picture(seed: int = 0, kind: str = "PNG", size: int = IMAGE) -> bytes:
    """The bytes of a random image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(side: int = 12_000) -> bytes:
    """A small PNG file of very many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", optimize=True)
    return file.getvalue()


class SlowModel:
    """A model that says how bright an image is, when it is let; it notes what it gets."""

    def __init__(self, generation: str = "first") -> None:
        self.generation, self.about = generation, {"tasks": []}
        self.let = threading.Event()
        self.let.set()
        self.entered = threading.Event()
        self.passes: list[int] = []
        self.prepared: list[tuple[int, int]] = []

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        self.prepared.append(image.size)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()

    def answer(self, images: torch.Tensor, top: int) -> list[Prediction]:
        self.passes.append(len(images))
        self.entered.set()
        assert self.let.wait(300)
        if bool((images == 255).all(3).all(2).all(1).any()):
            raise RuntimeError("a white image breaks this model")
        classes = tuple((f"{self.generation} {k}", 1 / (k + 2)) for k in range(max(top, 1)))
        return [
            Prediction(None, self.generation, float(image.mean()), "task 1", 1.0, 0.0, classes)
            for image in images
        ]


class Fixed:
    """A source whose model changes by hand."""

    def __init__(self, model: Any) -> None:
        self.current, self.refused, self.taken, self.refusals = model, None, 0, 0

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Waits until something is so; on a busy machine it takes a moment longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def running(source: Source, limits: Limits | None = None, token: str | None = None) -> Iterator[str]:
    """A real server on a free port in a thread; gives its address."""
    app = create_app(source, limits, token, local=token is None)
    # A connection that idles while a test waits is not closed in the moment in which it is used again.
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False, timeout_keep_alive=3600)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()
