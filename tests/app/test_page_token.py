"""The token of a page, and files that a hand-written request names."""

from __future__ import annotations

import json
import re
import stat
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import pytest

from duallora.app.page_token import TokenNeeded, opener
from duallora.app.server import LocalOnly, create_app
from duallora.app.session import Session
from duallora.app.uploads import Uploads
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest

starlette = pytest.importorskip("starlette.testclient", reason="the extra app is not installed")
TOKEN = "t" * 43  # fixed: all processes that test have to collect the same names


async def inner(scope: Any, receive: Any, send: Any) -> None:
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def client() -> Any:
    made = starlette.TestClient(LocalOnly(TokenNeeded(inner, TOKEN, 7860)), base_url="http://127.0.0.1:7860")
    made.follow_redirects = False
    return made


@pytest.mark.parametrize(
    "path", ["/", "/?token=", "/?token=" + TOKEN[:-1], "/?token=" + TOKEN + "x", "/?token=ü", "/gradio_api/x"]
)
@pytest.mark.parametrize("cookie", [None, "duallora-7860=", "duallora-7861=" + TOKEN, 'a=b;;=;"', TOKEN])
def test_without_the_token_nothing_is_answered(client: Any, path: str, cookie: str | None) -> None:
    headers = {} if cookie is None else {"Cookie": cookie}
    answer = client.get(path, headers=headers)
    assert answer.status_code == 401 and "asks for its token" in answer.text
    assert client.post(path, headers=headers).status_code == 401
    assert "set-cookie" not in answer.headers and TOKEN not in answer.text


def test_the_printed_address_opens_the_page_and_the_token_leaves_the_address(client: Any) -> None:
    answer = client.get(f"/?token={TOKEN}&__theme=dark")
    assert answer.status_code == 303 and answer.headers["location"] == "/?__theme=dark"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and answer.headers["cache-control"] == "no-store"
    assert client.get("/some/where").text == "/some/where"  # the cookie is sent now
    assert client.post("/some/where").text == "/some/where"


@pytest.mark.parametrize("path", ["//evil.example/x", "/\\evil.example", "///evil.example"])
def test_the_token_leads_to_no_other_host(path: str) -> None:
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": f"token={TOKEN}".encode(),
        "headers": [],
    }
    asyncio.run(TokenNeeded(inner, TOKEN, 1)(scope, None, send))
    place = dict(sent[0]["headers"])[b"location"]
    assert sent[0]["status"] == 303 and re.fullmatch(rb"/[^/\\].*", place)


def test_post_does_not_take_the_token_from_the_address(client: Any) -> None:
    assert client.post(f"/?token={TOKEN}").status_code == 401


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:80@evil", "evil@127.0.0.1", "127.0.0.1.evil.example", "", "[::1", "127.0.0.1:80:90"],
)
def test_only_own_names_are_answered(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:7860", "127.9.9.9"])
def test_own_names_are(client: Any, host: str) -> None:
    client.cookies.set("duallora-7860", TOKEN)
    assert client.get("/x", headers={"Host": host, "Cookie": f"duallora-7860={TOKEN}"}).text == "/x"


def test_web_sockets_are_closed(client: Any) -> None:
    with pytest.raises(starlette.WebSocketDisconnect), client.websocket_connect("/x"):
        pass


def test_a_browser_is_given_no_token_as_an_argument(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:1/?token={TOKEN}"
    place = opener(tmp_path, address)
    path = Path(url2pathname(place.removeprefix("file://")))
    assert TOKEN not in place and address in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_of_the_user_are_not_copied_by_a_hand_written_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio copies what a request names into its temporary folder unless its own check is on."""
    pytest.importorskip("gradio", reason="the extra app is not installed")

    secret, temporary = tmp_path / "secret.svg", tmp_path / "tmp"
    secret.write_text("<svg>a secret that nobody uploaded</svg>")
    temporary.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(temporary))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    request = ModelRequest(MethodChoice("duallora", {}), device="cpu")
    session, address = Session(tmp_path / "model", request, Uploads(temporary)), "http://127.0.0.1:1"
    page = create_app(session, TOKEN, 1)
    with closing(session), starlette.TestClient(page, base_url=address, follow_redirects=False) as client:
        assert client.get("/").status_code == 401
        assert client.get(f"/?token={TOKEN}").status_code == 303
        config = client.get("/config").json()
        takes_files = {each["id"] for each in config["components"] if each["type"] in ("file", "image")}
        asked = 0
        for function in config["dependencies"]:
            if not takes_files & set(function["inputs"]):
                continue
            named = {"path": str(secret), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
            files = {each["id"]: each["type"] for each in config["components"]}
            data = [
                ([named] if files[each] == "file" else named) if each in takes_files else None
                for each in function["inputs"]
            ]
            body = {"data": data, "fn_index": function["id"], "session_hash": "abc", "trigger_id": None}
            client.post("/gradio_api/queue/join", json=body, headers={"Origin": address})
            asked += 1
            with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "abc"}) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data:") and json.loads(line[5:]).get("msg") in (
                        "process_completed",
                        "close_stream",
                        "unexpected_error",
                    ):
                        break
        assert asked
        copies = [
            path for path in temporary.rglob("*") if path.is_file() and b"a secret" in path.read_bytes()
        ]
        assert copies == []
        shown = client.get(f"/gradio_api/file={secret}")
        assert shown.status_code in (403, 404) and "secret that" not in shown.text
