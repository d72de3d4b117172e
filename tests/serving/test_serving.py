"""The server on bad and good input, with a model that takes as long as a test wants."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from serving_tools import Fixed, SlowModel, bomb, picture, running
from starlette.testclient import TestClient

from duallora.data.images import decode_image
from duallora.errors import DualLoRAError
from duallora.serving import app as app_module
from duallora.serving.app import PATHS, create_app
from duallora.serving.batching import MOST_IMAGES, Batcher
from duallora.serving.guard import is_local, read_token
from duallora.serving.limits import Limits
from duallora.serving.listening import listening

TOKEN = "0123456789abcdef0123"
LIMITS = Limits(max_body=0.5, max_pixels=1_000_000, max_images=4, queue=8, timeout=300)
RAW = {"Content-Type": "image/png"}


@pytest.fixture
def model() -> SlowModel:
    return SlowModel()


@pytest.fixture
def client(model: SlowModel) -> Iterator[TestClient]:
    app = create_app(Fixed(model), LIMITS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def form(*pictures: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]


def refused(response: httpx.Response, status: int, *parts: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (sentence,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert not [part for part in parts if part not in sentence], sentence


# -- good requests ------------------------------------------------------------------------------------------


def test_raw_bytes_and_forms_are_answered_as_predict_does(client: TestClient) -> None:
    raw = client.post("/predict", content=picture(1), headers=RAW)
    assert raw.status_code == 200 and raw.headers["x-model-generation"] == "first"
    (answer,) = raw.json()["predictions"]
    fields = ["path", "class", "probability", "task", "task_confidence", "unknown", "top"]
    assert list(answer) == fields and answer["path"] is None and len(answer["top"]) == 3
    several = client.post("/predict?top=1", files=form(picture(1), picture(2, "JPEG"), picture(3, "GIF")))
    answers = several.json()["predictions"]
    assert [each["path"] for each in answers] == ["0.png", "1.png", "2.png"]
    assert answers[0]["probability"] == answer["probability"] != answers[1]["probability"]
    assert [len(each["top"]) for each in answers] == [1, 1, 1]
    unknown = client.post("/predict?unknown_below=1", content=picture(1))
    assert unknown.json()["predictions"][0]["class"] == "first"
    assert client.post("/predict", content=picture(1)).json() == raw.json()


def test_an_image_needs_no_content_type(client: TestClient) -> None:
    assert client.post("/predict", content=picture()).status_code == 200
    assert client.post("/predict", content=picture(), headers={"Content-Type": "a/b"}).status_code == 200


def test_the_other_paths(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "generation": "first", "newest": "served"}
    assert client.get("/model").json() == {"tasks": []}
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == set(PATHS) - {"/docs", "/openapi.json"}
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not [path for path in schema["paths"] if path not in page.text]
    assert "http://" not in page.text.replace("http://HOST:PORT", "") and "https://" not in page.text


def test_metrics_count_what_happened(client: TestClient) -> None:
    client.post("/predict", files=form(picture(), picture(1)))
    client.post("/predict", content=b"no image")
    client.get("/secret/path")
    lines = client.get("/metrics").text.splitlines()
    assert 'duallora_requests_total{path="/predict",status="200"} 1' in lines
    assert 'duallora_requests_total{path="/predict",status="400"} 1' in lines
    assert 'duallora_requests_total{path="other",status="404"} 1' in lines
    assert 'duallora_batch_images_bucket{le="1"} 0' in lines
    assert 'duallora_batch_images_bucket{le="2"} 1' in lines
    assert "duallora_batch_images_sum 2" in lines and "duallora_predict_seconds_count 1" in lines
    assert 'duallora_model_info{generation="first"} 1' in lines
    assert "duallora_requests_waiting 0" in lines
    kinds = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(set(kinds)) == len(kinds)


# -- bad requests -------------------------------------------------------------------------------------------


def test_what_is_no_image_is_named(client: TestClient) -> None:
    refused(client.post("/predict", content=b"hello"), 400, "image 1 is not an image")
    refused(client.post("/predict", content=picture()[:200]), 400, "image 1 cannot be decoded")
    refused(client.post("/predict", files=form(picture(), b"hello")), 400, "image 2 (1.png) is not an image")
    refused(client.post("/predict", content=b""), 400, "has no body")
    refused(client.post("/predict", data={"a": "b"}, files=[]), 400, "not an image")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    refused(client.post("/predict", content=svg), 400, "not an image")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    refused(client.post("/predict", content=postscript), 400, "not an image")
    assert client.post("/predict", content=picture()).status_code == 200


def test_malformed_forms(client: TestClient) -> None:
    kind = "multipart/form-data"
    refused(client.post("/predict", content=b"x", headers={"Content-Type": kind}), 400, "multipart form")
    cut = {"Content-Type": f"{kind}; boundary=abc"}
    refused(client.post("/predict", content=b"--abc\r\nContent-Dis", headers=cut), 400, "form")
    no_file = b'--abc\r\nContent-Disposition: form-data; name="image"\r\n\r\ntext\r\n--abc--\r\n'
    refused(client.post("/predict", content=no_file, headers=cut), 400, "no image", "image=@photo.jpg")
    fields = b"".join(
        b'--abc\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(40)
    )
    refused(client.post("/predict", content=fields + b"--abc--\r\n", headers=cut), 400, "Too many fields")


def test_pixels_are_counted_before_they_are_decoded(client: TestClient) -> None:
    small = bomb()
    assert len(small) < 100_000
    refused(client.post("/predict", content=small), 413, "more than 1,000,000 pixels", "not decoded")
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG", optimize=True)  # Pillow itself refuses this one
    refused(client.post("/predict", content=huge.getvalue()), 413, "1,000,000 pixels")


def test_bodies_and_numbers_of_images_are_limited(client: TestClient) -> None:
    refused(client.post("/predict", content=bytes(500_001)), 413, "larger than 0.5 MB")

    def unannounced() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(100_000)

    refused(client.post("/predict", content=unannounced()), 413, "larger than 0.5 MB")
    assert client.post("/predict", files=form(*[picture(i) for i in range(4)])).status_code == 200
    refused(client.post("/predict", files=form(*[picture(i) for i in range(5)])), 413, "more than 4 images")


@pytest.mark.parametrize("query", ["top=0", "top=x", "top=1001", "unknown_below=2", "unknown_below=nan"])
def test_parameters_out_of_range(client: TestClient, query: str) -> None:
    refused(client.post(f"/predict?{query}", content=picture()), 422, query.split("=")[0], "see /docs")


def test_other_paths_and_verbs(client: TestClient) -> None:
    refused(client.get("/nothing"), 404, "there is no /nothing", "/predict")
    refused(client.get("/predict"), 405, "does not take GET")
    refused(client.post("/learn", content=b""), 404)


def test_a_fault_of_the_model_is_the_requests_own(client: TestClient, model: SlowModel) -> None:
    white = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(white, "PNG")
    refused(client.post("/predict", content=white.getvalue()), 500, "internal error")
    assert client.post("/predict", content=picture()).status_code == 200


# -- who may ask --------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_everywhere_but_for_health(model: SlowModel) -> None:
    with TestClient(create_app(Fixed(model), LIMITS, TOKEN), base_url="http://any.where") as client:
        for path in PATHS:
            if path != "/health":
                refused(client.get(path), 401, "Authorization: Bearer")
        assert client.get("/health").status_code == 200
        for wrong in (
            "",
            TOKEN,
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"bearer {TOKEN.upper()}",
            "Bearer é",
        ):
            headers = {"Authorization": wrong.encode()}
            refused(client.post("/predict", content=picture(), headers=headers), 401)
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post("/predict", content=picture(), headers=right).status_code == 200
    assert model.passes == [1]


def test_a_local_server_does_not_answer_to_foreign_names(model: SlowModel) -> None:
    with TestClient(create_app(Fixed(model), local=True), base_url="http://localhost:8000") as client:
        assert client.get("/model").status_code == 200
        for host in ("127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "[::1]", "LOCALHOST"):
            assert client.get("/model", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1:8000", ""):
            refused(client.get("/model", headers={"Host": host}), 421, "localhost alone")


def test_addresses_of_this_machine() -> None:
    assert all(map(is_local, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_local, ["0.0.0.0", "::", "192.168.0.1", "example.org", ""]))


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words of a token here", "täglich-neue-wörter".encode()]
)
def test_what_is_no_token(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("token") / "token"
    with pytest.raises(DualLoRAError, match="cannot be read"):
        read_token(file)
    file.write_bytes(content)
    with pytest.raises(DualLoRAError, match="token-file"):
        read_token(file)
    file.write_text(f"  {TOKEN}\n")
    assert read_token(file) == TOKEN


# -- together -----------------------------------------------------------------------------------------------


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
        _wait(lambda: len(submitted) == 21)
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
        _wait(lambda: files[0]() is None)
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
        _wait(lambda: _waiting(client) == 3)
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
        _wait(lambda: _waiting(client) == 0)
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
        _wait(lambda: _waiting(client) == 1)
        slow.settimeout(300)
        assert b" 503 " in slow.recv(4096)
        slow.close()
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(head)
        _wait(lambda: _waiting(client) == 1)
        gone.close()
        _wait(lambda: _waiting(client) == 0)
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


def _wait(condition: object, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        threading.Event().wait(0.02)


def test_bodies_do_not_wait_for_acknowledgements() -> None:
    """Connections have TCP_NODELAY: head and body are two packets, and the second one waited 40 ms."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
