"""Clients of a server, as light as possible: what they cost, the server on the same machine does not have."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


def picture(seed: int, size: int, kind: str = "JPEG") -> bytes:
    """The bytes of an image file with some structure, which compresses as photographs do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def post(path: str, body: bytes, kind: str = "image/jpeg") -> bytes:
    """A whole request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    """A whole request without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def form(*images: bytes) -> bytes:
    """A request with several images."""
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="image"; filename="{i}.jpg"\r\n\r\n'.encode()
        + x
        + b"\r\n"
        for i, x in enumerate(images)
    ]
    return post("/predict", b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b")


class Connection:
    """One kept-alive connection; it connects again where the server has closed it meanwhile."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._streams is not None and self._streams[0].at_eof():
            self.close()
        kept = self._streams is not None
        try:
            head = await self._head(request)
        except (OSError, asyncio.IncompleteReadError) as error:
            # An idle connection that the server closes just now is no lost answer: nothing of one has come.
            if not kept or getattr(error, "partial", b""):
                raise
            self.close()
            head = await self._head(request)
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        body = await self._streams[0].readexactly(length)
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1]), body

    async def _head(self, request: bytes) -> str:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        writer.write(request)
        return (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()

    def close(self) -> None:
        """Goes away."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: how long they asked.
        latencies: of every answer, in seconds.
        lost: answers other than 200, and broken connections.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Of the latencies, in milliseconds."""
        return 1e3 * float(np.quantile(self.latencies, share))


async def load(port: int, clients: int, seconds: float, requests: Sequence[bytes]) -> Load:
    """Clients that each ask again as soon as they are answered; each takes the requests in turn."""
    result = Load()
    begin = time.perf_counter()

    async def client(number: int) -> None:
        connection, turn = Connection(port), number
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            try:
                status, body = await connection.ask(requests[turn % len(requests)])
            except (OSError, asyncio.IncompleteReadError) as error:
                result.lost.append(repr(error))
                connection.close()
                continue
            turn += 1
            if status == 200:
                result.latencies.append(time.perf_counter() - start)
            else:
                result.lost.append(f"{status} {body[:200]!r}")
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    result.seconds = time.perf_counter() - begin
    return result
