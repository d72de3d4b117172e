"""The token of a page: who has the printed address may use it, and no other account of this machine."""

from __future__ import annotations

import hmac
import html
import secrets
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

_SENTENCE = (
    "This page asks for its token: open the address that `duallora app` has printed, with all that stands "
    "behind the question mark."
)


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(32)


class TokenNeeded:
    """Layer that lets requests through which carry the token, in the address once, then in a cookie.

    Args:
        app: what is guarded.
        token: that is asked for.
        port: of the page. Cookies do not tell the ports of a machine apart, so that its name does.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app, self.token, self.name = app, token, f"duallora-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, takes the token out of its address, or refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the page needs none
        elif self._is_token(self._cookie(scope)):
            await self.app(scope, receive, send)
        else:
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            given = [value for key, value in query if key == "token"]
            if scope["method"] == "GET" and given and self._is_token(given[-1]):
                rest = [(key, value) for key, value in query if key != "token"]
                await self._welcome(scope, send, urlencode(rest))
            else:
                await _answer(send, 401, [(b"content-type", b"text/plain; charset=utf-8")], _SENTENCE)

    async def _welcome(self, scope: Any, send: Any, query: str) -> None:
        """Puts the token into a cookie and out of the address, which is shown, kept and sent on."""
        # One slash: an address that begins with two would name another host.
        place = "/" + quote(scope["path"].lstrip("/\\")) + (f"?{query}" if query else "")
        cookie = f"{self.name}={self.token}; HttpOnly; SameSite=Lax; Path=/"
        headers = [
            (b"location", place.encode("latin-1")),
            (b"set-cookie", cookie.encode("latin-1")),
            (b"cache-control", b"no-store"),
            (b"referrer-policy", b"no-referrer"),
        ]
        await _answer(send, 303, headers, "")

    def _cookie(self, scope: Any) -> str:
        found: SimpleCookie = SimpleCookie()
        for key, value in scope["headers"]:
            if key == b"cookie":
                try:
                    found.load(value.decode("latin-1"))
                except CookieError:
                    continue
        own = found.get(self.name)
        return "" if own is None else own.value

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def opener(folder: Path, address: str) -> str:
    """A file that leads to an address, for a browser: what is given to a program, other accounts can read."""
    path = folder / "open.html"
    path.touch(0o600)
    target = html.escape(address, quote=True)
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={target}">'
        f'<a href="{target}">The page</a>\n',
        encoding="utf-8",
    )
    return path.as_uri()


async def _answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], sentence: str) -> None:
    body = sentence.encode()
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
