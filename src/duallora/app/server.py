"""The page behind an address of this machine, and of no other."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.app.page_token import TokenNeeded, new_token, opener
from duallora.app.uploads import Uploads
from duallora.runtime.ending import LastMoment, watched
from duallora.serving.form_log import hush_forms
from duallora.serving.guard import host_name, is_own_name
from duallora.serving.listening import listening

if TYPE_CHECKING:
    from duallora.teaching.model_request import ModelRequest

HOST = "127.0.0.1"
_GRACE = 2  # seconds that open pages are waited for at the end
# The page needs scripts and styles of its own, and pictures that lie in the HTML; nothing from elsewhere.
_POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'none'; "
    b"form-action 'self'"
)


class LocalOnly:
    """Outermost layer: answers to names of this machine alone, and to no page of another origin.

    Without it a web page in the same browser could reach the model under a name of its own (DNS rebinding),
    or send it a lesson.

    Args:
        app: what is guarded.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket, which the page does not need
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        name = host_name(host)
        if name is None or not is_own_name(name):
            await _refuse(send, 421, "this page answers to names of this machine alone.")
        elif origin and origin != f"http://{host}":
            await _refuse(send, 403, "this page takes nothing from other pages.")
        else:
            await self.app(scope, receive, _guarded(send))


def serve(
    folder: Path,
    request: ModelRequest,
    port: int,
    tell: Callable[[str], None],
    open_: bool,
    ask_token: bool = True,
) -> None:
    """Shows the page until the process is asked to end.

    Args:
        folder: of the model, which need not be there yet.
        request: what the command line said of the model.
        port: to listen at; 0 takes a free one.
        tell: gets the line that says where the page is.
        open_: whether a browser is opened at it.
        ask_token: whether requests have to carry a token, which is part of the address that is told.

    Raises:
        DualLoRAError: the port is taken, or the folder holds no sound model and something else.
    """
    with listening(HOST, port) as listener, _ending_in_order(), Uploads() as uploads:
        # Gradio reads these when it is imported and when its components are made.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
        from duallora.app.session import Session

        session = Session(folder, request, uploads)
        try:
            session.newest()
            number = listener.getsockname()[1]
            token = new_token() if ask_token else None
            application = create_app(session, token, number)
            address = f"http://{HOST}:{number}" + (f"/?token={token}" if token is not None else "")
            tell(f"page for {folder} at {address}; Ctrl-C ends it")
            if open_:
                import webbrowser

                webbrowser.open(opener(uploads.folder, address))
            uploads.start_sweeping()
            _run(application, listener, LastMoment(lambda: _leave_nothing(session, uploads)))
        finally:
            session.close()


def create_app(session: Any, token: str | None = None, port: int = 0) -> Any:
    """The page as an ASGI application.

    Args:
        session: the model.
        token: that requests have to carry; None asks for none.
        port: that it listens at.
    """
    import gradio as gr
    from fastapi import FastAPI

    from duallora.app import views

    hush_forms()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = views.build(session)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=True,
        theme=views.theme(),
        css=views.style(),
        js=views.LIVE,
    )
    # Gradio checks that files named in a request were uploaded, but only on pages that it launched itself.
    page.has_launched = page.is_running = True
    if token is not None:
        app.add_middleware(TokenNeeded, token=token, port=port)
    app.add_middleware(LocalOnly)
    return app


def _leave_nothing(session: Any, uploads: Uploads) -> None:
    """For an end that waits no longer: nothing stays of the copies nor of a lesson that goes on."""
    session.give_up()
    uploads.close()


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Inside, SIGTERM and the end of the terminal raise SystemExit: the copies have to be deleted."""
    # uvicorn handles SIGTERM while it runs, and sends it on when it has ended.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is what nohup asks for
        hang_up = signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        before[signal.SIGHUP] = hang_up
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(application: Any, listener: socket.socket, last: LastMoment) -> None:
    import uvicorn

    config = uvicorn.Config(
        application, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE
    )
    watched(uvicorn.Server(config), last).run(sockets=[listener])


def _guarded(send: Any) -> Any:
    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [
                (b"content-security-policy", _POLICY),
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
            ]
            message["headers"] = [*message["headers"], *own]
        await send(message)

    return guarded


async def _refuse(send: Any, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
