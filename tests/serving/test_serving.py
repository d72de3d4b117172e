"""The server on bad and good input, with a model that takes as long as a test wants."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from serving_answers import LIMITS, form, refused
from serving_tools import Fixed, SlowModel, bomb, picture
from starlette.testclient import TestClient

from duallora.errors import DualLoRAError
from duallora.serving.app import PATHS, create_app
from duallora.serving.guard import is_local, read_token

TOKEN = "0123456789abcdef0123"
RAW = {"Content-Type": "image/png"}


# -- good requests ------------------------------------------------------------------------------------------


def test_raw_bytes_and_forms_are_answered_as_predict_does(client: TestClient) -> None:
    raw = client.post("/predict", content=picture(1), headers=RAW)
    assert raw.status_code == 200 and raw.headers["x-model-generation"] == "first"
    (answer,) = raw.json()["predictions"]
    fields = ["path", "class", "probability", "task", "task_confidence", "unknown", "called_unknown", "top"]
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
    refused(client.post("/predict", content=svg), 400, "image 1 is SVG", "convert it")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    refused(client.post("/predict", content=postscript), 400, "image 1 is PostScript", "convert it")
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


def test_a_malformed_form_is_one_sentence_and_nothing_on_stderr(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own: Python prints what none takes
    logging.getLogger("duallora.elsewhere").warning("is printed")
    kind = {"Content-Type": "multipart/form-data; boundary=abc"}
    for content in (b"--abd\r\n", b"--abc\rx", b"--abcx"):
        refused(
            client.post("/predict", content=content, headers=kind), 400, "the multipart form cannot be read"
        )
    assert capsys.readouterr().err == "is printed\n"


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
