"""``duallora app``: what it refuses, who may reach it, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from app_tools import running_app
from command_line import Call, assert_refused


def test_the_command_refuses_what_it_cannot_do(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(call("app", tmp_path / "m", "--port", 70000), "--port", "65535")
    assert_refused(call("app", tmp_path / "m", "--host", "0.0.0.0"), "--host")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert_refused(call("app", tmp_path / "m", "--port", number), f"port {number}", "another --port")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("hello")
    assert_refused(call("app", tmp_path / "full", "--port", 0), "holds other files")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(call("app", tmp_path / "m"), "gradio is missing", "duallora[app]")
    assert not (tmp_path / "m").exists()


@pytest.mark.process
def test_gradio_is_imported_by_the_command_alone() -> None:
    code = "import sys, duallora, duallora.commands.app, duallora.app.session; print('gradio' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_running_command_answers_to_this_machine_and_ends_cleanly(
    tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("gradio", reason="the extra app is not installed")
    import httpx

    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp")}
    with running_app(tmp_path / "model", environment=environment) as (address, token, process):
        client = httpx.Client(timeout=300)
        assert client.get(address + token).status_code == 303
        page = client.get(address)
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        assert client.get(address, headers={"Host": "evil.example"}).status_code == 421
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            answer = client.post(f"{address}/gradio_api/upload", headers={"Origin": origin})
            assert answer.status_code == 403
        sent = client.post(
            f"{address}/gradio_api/upload", files={"files": ("a.png", b"x")}, headers={"Origin": address}
        )
        assert sent.status_code == 200 and Path(sent.json()[0]).is_relative_to(tmp_path / "tmp")
        assert client.get(f"{address}/gradio_api/info").status_code in (200, 404)
        process.send_signal(number)
        assert process.wait(300) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    assert list((tmp_path / "tmp").glob("duallora-app-*")) == []
    assert not (tmp_path / "model").exists()


@pytest.mark.process
def test_interrupting_the_command(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra app is not installed")
    with running_app(tmp_path / "model") as (_, _, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "duallora: interrupted; every saved file is whole.\n"
