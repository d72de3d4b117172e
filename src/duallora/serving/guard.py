"""Who may ask: the token, the names that the server answers to, and the count of what was asked."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import time
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duallora.errors import DualLoRAError
from duallora.serving.prometheus import Metrics
from duallora.storage.regular import read_text

OPEN = "/health"
"""The path that is answered without the token."""

SHORTEST_TOKEN = 16
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str | None:
    """The name in a ``Host`` header without the port; None where it is no name and port.

    ``127.0.0.1:80@evil`` is none: what stands before an ``@`` would be a user's name in an address.
    """
    found = _HOST.fullmatch(host)
    return None if found is None else found[1]


def is_own_name(name: str) -> bool:
    """Whether a name is one that this machine has for itself."""
    return name.lower() in LOCAL_NAMES or is_local(name)


def read_token(file: Path) -> str:
    """The token in a file, without the space around it.

    Raises:
        DualLoRAError: the file cannot be read, or what it holds is no token.
    """
    try:
        token = read_text(file, "ascii").strip()
    except OSError as error:
        raise DualLoRAError(f"--token-file {file} cannot be read ({error.strerror}); check it.") from error
    except UnicodeDecodeError as error:
        raise DualLoRAError(f"--token-file {file} is no ASCII text; write one line of letters.") from error
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise DualLoRAError(
            f"--token-file {file} must hold one word of at least {SHORTEST_TOKEN} characters; "
            "`openssl rand -hex 32` makes one."
        )
    return token


class Guard:
    """Outermost layer of the application.

    Args:
        app: what is guarded.
        metrics: gets every request.
        paths: that are counted by their own name.
        token: that ``Authorization: Bearer`` has to carry; None asks for none.
        local: answer only to names of this machine, so that no web page can reach the server under a name of
            its own (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, paths: Iterable[str], token: str | None, local: bool
    ) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)
        self.token = None if token is None else f"Bearer {token}".encode()
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it before the application sees it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, noted)
            else:
                await _answer(noted, *refusal)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.request(path, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host_name(host)
        if self.local and (name is None or not is_own_name(name)):
            return 421, f"this server answers to localhost alone, not to {(name or host)[:100]!r}."
        if self.token is None or scope["path"] == OPEN:
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self.token):
            return None
        return 401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN."


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start: MutableMapping[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
