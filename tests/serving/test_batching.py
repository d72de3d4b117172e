"""Requests that come together: shared passes, full queues, slow clients."""

from __future__ import annotations

import asyncio
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from serving_answers import refused
from serving_tools import Fixed, SlowModel, picture, running, until

from duallora.data.images import decode_image
from duallora.errors import DualLoRAError
from duallora.serving import app as app_module
from duallora.serving.batching import MOST_IMAGES, Batcher
from duallora.serving.limits import Limits
from duallora.serving.listening import listening

pytestmark = pytest.mark.slow


def test_requests_that_arrive_together_share_a_pass(
    model: SlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, submitted = Batcher.submit, []

    def noted(*given: Any) -> Any:
        answer = submit(*given)
        submitted.append(answer)
        return answer

    monkeypatch.setattr(Batcher, "submit", noted)
    with (
        running(Fixed(model), Limits(queue=64, timeout=300)) as address,
        ThreadPoolExecutor(21) as pool,
        httpx.Client(base_url=address, timeout=300, limits=httpx.Limits(max_connections=32)) as client,
    ):
        alone = [client.post("/predict", content=picture(i)).json() for i in range(20)]
        model.let.clear()
        model.passes.clear()
        submitted.clear()
        model.entered.clear()
        first = pool.submit(client.post, "/predict", content=picture(0))
        assert model.entered.wait(300)
        rest = [pool.submit(client.post, "/predict?top=5", content=picture(i)) for i in range(20)]
        until(lambda: len(submitted) == 21)
        model.let.set()
        together = [each.result().json()["predictions"][0] for each in rest]
        assert first.result().json() == alone[0]
        for found, expected in zip(together, alone, strict=True):
            assert found["probability"] == expected["predictions"][0]["probability"]
            assert len(found["top"]) == 5
    assert model.passes == [1, 20]


def test_one_request_that_breaks_a_pass_breaks_no_other() -> None:
    model, sizes = SlowModel(), []
    batcher = Batcher(sizes.append)
    model.let.clear()
    held = batcher.submit(model, torch.zeros(1, 3, 2, 2), 1)
    assert model.entered.wait(300)
    good = [batcher.submit(model, torch.full((2, 3, 2, 2), float(i)), i + 1) for i in range(3)]
    bad = batcher.submit(model, torch.full((1, 3, 2, 2), 255.0), 1)
    gone = batcher.submit(model, torch.full((1, 3, 2, 2), 9.0), 1)
    assert gone.cancel()
    model.let.set()
    assert [[p.probability for p in each.result(300)] for each in good] == [[0.0] * 2, [1.0] * 2, [2.0] * 2]
    with pytest.raises(RuntimeError, match="white image"):
        bad.result(300)
    assert held.result(300)[0].probability == 0.0
    assert sizes == [1, 7, 2, 2, 2, 1]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(model, torch.zeros(1, 3, 2, 2), 1)


def test_the_thread_that_computes_outlives_whatever_fails_around_a_pass() -> None:
    model, seen = SlowModel(), []

    def observe(images: int) -> None:
        seen.append(images)
        if images == 5:
            raise ZeroDivisionError

    batcher = Batcher(observe)
    with pytest.raises(ZeroDivisionError):
        batcher.submit(model, torch.zeros(5, 3, 2, 2), 1).result(300)
    model.let.clear()
    model.entered.clear()
    held = batcher.submit(model, torch.zeros(1, 3, 2, 2), 1)
    assert model.entered.wait(300)
    sizes = [batcher.submit(model, torch.zeros(2, 3, side, side), 1) for side in (2, 4)]  # torch.cat fails
    model.let.set()
    assert [len(each.result(300)) for each in (held, *sizes)] == [1, 2, 2]
    assert seen == [5, 1, 2, 2]
    batcher.close()


def test_files_are_let_go_once_they_are_decoded(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a request waits for its forward pass, nothing but its images is in memory."""
    files: list[weakref.ref[bytearray]] = []

    class Body(bytearray):
        """Bytes that can be watched."""

    async def read(*_: object) -> Body:
        body = Body(picture())
        files.append(weakref.ref(body))
        return body

    monkeypatch.setattr(app_module, "read_body", read)
    with (
        running(Fixed(model), Limits(timeout=300)) as address,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        model.let.clear()
        asked = pool.submit(client.post, "/predict", content=picture())
        assert model.entered.wait(300)
        until(lambda: files[0]() is None)
        model.let.set()
        assert asked.result().status_code == 200


def test_passes_have_a_size_and_one_model() -> None:
    first, second, sizes = SlowModel(), SlowModel("second"), []
    batcher = Batcher(sizes.append)
    first.let.clear()
    jobs = [batcher.submit(first, torch.zeros(1, 3, 2, 2), 1)]
    assert first.entered.wait(300)
    jobs += [batcher.submit(first, torch.zeros(30, 3, 2, 2), 1) for _ in range(3)]
    jobs += [batcher.submit(second, torch.zeros(3, 3, 2, 2), 1) for _ in range(2)]
    jobs += [batcher.submit(first, torch.zeros(MOST_IMAGES + 6, 3, 2, 2), 1)]
    first.let.set()
    assert [job.result(300)[0].label for job in jobs] == ["first"] * 4 + ["second"] * 2 + ["first"]
    batcher.close()
    assert sizes == [1, 60, 30, 6, MOST_IMAGES + 6]


def test_too_many_requests_are_told_to_come_again(model: SlowModel) -> None:
    with (
        running(Fixed(model), Limits(queue=3, timeout=300)) as address,
        ThreadPoolExecutor(8) as pool,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        model.let.clear()
        held = [pool.submit(client.post, "/predict", content=picture(i)) for i in range(3)]
        until(lambda: _waiting(client) == 3)
        late = client.post("/predict", content=picture())
        refused(late, 429, "3 requests are waiting", "try again")
        assert late.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        model.let.set()
        assert [each.result().status_code for each in held] == [200] * 3
        assert client.post("/predict", content=picture()).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(model: SlowModel) -> None:
    """Its place is free once the forward pass is over: until then the thread works for it."""
    decode_image(picture(), "the first image loads all of Pillow")
    with (
        running(Fixed(model), Limits(timeout=5, queue=1)) as address,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        assert client.post("/predict", content=picture()).status_code == 200
        model.let.clear()
        refused(client.post("/predict", content=picture()), 503, "longer than 5 s")
        assert _waiting(client) == 1
        refused(client.post("/predict", content=picture()), 429, "1 requests are waiting")
        model.let.set()
        until(lambda: _waiting(client) == 0)
        assert client.post("/predict", content=picture()).status_code == 200


def test_a_client_that_sends_slowly_or_goes_away_costs_one_place_for_a_while(model: SlowModel) -> None:
    import socket

    with (
        running(Fixed(model), Limits(timeout=5, queue=1)) as address,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        port = int(address.rsplit(":", 1)[1])
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nxx"
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(head)
        until(lambda: _waiting(client) == 1)
        slow.settimeout(300)
        assert b" 503 " in slow.recv(4096)
        slow.close()
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(head)
        until(lambda: _waiting(client) == 1)
        gone.close()
        until(lambda: _waiting(client) == 0)
        assert client.post("/predict", content=picture()).status_code == 200


def test_a_body_that_is_refused_does_not_break_the_connection(model: SlowModel) -> None:
    """The server throws the rest away, so a client that reads only when it has sent all gets its answer."""
    with (
        running(Fixed(model), Limits(max_body=0.1)) as address,
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        for _ in range(3):
            refused(client.post("/predict", content=bytes(3_000_000)), 413, "0.1 MB")
            assert client.post("/predict", content=picture()).status_code == 200


def test_the_clients_of_the_benchmark_connect_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server closes connections that were idle for a while, without a word in its last answer."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from http_load import Connection, get

    async def ask() -> list[int]:
        closed, connections = asyncio.Event(), 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            if connections == 2:  # takes one more request and goes without a word
                await reader.readuntil(b"\r\n\r\n")
            writer.close()
            closed.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connection = Connection(server.sockets[0].getsockname()[1])
        found = [(await connection.ask(get("/")))[0]]
        await closed.wait()
        await asyncio.sleep(0.05)  # either way of noticing is right
        found += [(await connection.ask(get("/")))[0] for _ in range(2)]
        connection.close()
        server.close()
        assert connections == 3
        return found

    assert asyncio.run(ask()) == [200, 200, 200]


@pytest.mark.parametrize(
    ("field", "option"), [("max_body", "--max-body"), ("queue", "--queue"), ("timeout", "--timeout")]
)
def test_limits_that_let_nothing_through_are_refused(field: str, option: str) -> None:
    for value in (0, -1, float("inf"), float("nan")):
        with pytest.raises(DualLoRAError, match=f"{option} must be more than 0 and finite, not {value}"):
            Limits(**{field: value})


def _waiting(client: httpx.Client) -> int:
    lines = client.get("/metrics").text.splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("duallora_requests_waiting ")))


def test_bodies_do_not_wait_for_acknowledgements() -> None:
    """Connections have TCP_NODELAY: head and body are two packets, and the second one waited 40 ms."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
