"""The application: what is answered under which path."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from duallora.data.decoding import Decoders
from duallora.predictions import as_document
from duallora.serving import prometheus
from duallora.serving.batching import Batcher, Model
from duallora.serving.form_log import hush_forms
from duallora.serving.guard import Guard
from duallora.serving.info_page import page
from duallora.serving.limits import Admission, Limits, Refused
from duallora.serving.requests import decoded, images_of, read_body
from duallora.storage.documents import finite

PATHS = ("/predict", "/model", "/health", "/metrics", "/docs", "/openapi.json")
_GENERATION = "X-Model-Generation"
_MOST_DECODERS = 4
"""Processes that decode, and threads that ask them; each may hold an image of ``max_pixels`` in full size."""

_STALLED = 10.0
"""Seconds without progress, while requests wait, after which the server says that it cannot answer."""

_ABOUT = (
    "Says what is on images: class, probability, task, confidence, and how unknown they look. Answers are "
    "JSON; an error is {error: one sentence}."
)
_EXAMPLE = "curl -F image=@photo.jpg -F image=@other.png 'http://HOST:PORT/predict?top=5'\n" + (
    "curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://HOST:PORT/predict"
)


class Source(Protocol):
    """Where the model comes from."""

    @property
    def current(self) -> Model:
        """The model that answers now."""

    @property
    def refused(self) -> str | None:
        """Why a newer one does not; None where there is none."""

    @property
    def taken(self) -> int:
        """Generations taken since the start."""

    @property
    def refusals(self) -> int:
        """Generations refused since the start."""

    def start(self) -> None:
        """Begins to look for newer ones."""

    def stop(self) -> None:
        """Ends that."""


def create_app(
    source: Source, limits: Limits | None = None, token: str | None = None, local: bool = False
) -> FastAPI:
    """The application around a model.

    Args:
        source: gives the model; started and stopped with the application.
        limits: what a request may ask.
        token: that requests have to carry; None asks for none.
        local: answer only to names of this machine.
    """
    hush_forms()
    server = _Server(source, limits or Limits())
    app = FastAPI(
        title="duallora serve",
        version=version("duallora"),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        lifespan=server.lifespan,
    )
    server.add_routes(app)
    _add_refusals(app)
    # Outermost, and without Starlette's own wrapper, which would put a task around every request.
    app.add_middleware(Guard, metrics=server.metrics, paths=PATHS, token=token, local=local)
    return app


class _Server:
    """What the handlers share."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits = source, limits
        self.metrics = prometheus.Metrics()
        self.admission = Admission(limits.queue)
        self._progress = time.monotonic()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """While the application runs: threads that compute, decode and look for new models."""
        self.batcher = Batcher(self.metrics.batch)
        processes = min(os.cpu_count() or 1, _MOST_DECODERS)
        self.decoders = Decoders(processes, self.limits.max_pixels)
        self.threads = ThreadPoolExecutor(processes, "duallora-decode")
        self.source.start()
        try:
            yield
        finally:
            self.decoders.close()  # first: whatever a decoder does, nothing waits for it
            self.source.stop()
            self.threads.shutdown(cancel_futures=True)
            self.batcher.close()

    def add_routes(self, app: FastAPI) -> None:
        """The paths."""
        app.post(
            "/predict",
            summary="What is on images",
            responses=_ANSWERS,
            openapi_extra={"requestBody": _BODY, "x-example": _EXAMPLE},
        )(self.predict)
        app.get("/model", summary="What the model holds, as duallora inspect --json")(self.model)
        app.get("/health", summary="Whether the server answers; needs no token")(self.health)
        app.get("/metrics", summary="Counters in Prometheus' text form", response_class=PlainTextResponse)(
            self.text
        )

        @app.get("/docs", include_in_schema=False)
        async def docs() -> HTMLResponse:
            return HTMLResponse(page(app.openapi()))

    async def predict(
        self,
        request: Request,
        top: int = Query(3, ge=1, le=1000, description="how many classes are given for each image"),
        unknown_below: float | None = Query(
            None, ge=0, le=1, description="call images unknown whose familiarity is below this"
        ),
    ) -> Response:
        """What is on one image or several: a multipart form of files, or the bytes of one image."""
        if not self.admission.busy:
            self._progressed()
        self.admission.enter()
        busy = _Busy(self.admission.leave)
        try:
            async with asyncio.timeout(self.limits.timeout):
                found, model = await self._predictions(request, top, busy)
        except TimeoutError as error:
            raise self.limits.time_refused() from error
        finally:
            busy.done()
        answers = [as_document(prediction, unknown_below) for prediction in found]
        return _json({"predictions": answers}, model.generation)

    async def _predictions(self, request: Request, top: int, busy: _Busy) -> tuple[list[Any], Model]:
        uploads = await images_of(request, await read_body(request, self.limits), self.limits)
        names = [upload.name for upload in uploads]
        model = self.source.current  # kept to the end, whatever generation comes meanwhile
        until = time.monotonic() + self.limits.timeout
        decoding = self.threads.submit(decoded, uploads, model.preprocess, self.decoders, until)
        decoding.add_done_callback(self._progressed)
        del uploads  # the thread alone keeps the files now, and lets them go when it has decoded them
        busy.until(decoding)
        answer = self.batcher.submit(model, await asyncio.wrap_future(decoding), top)
        answer.add_done_callback(self._progressed)
        del decoding
        busy.until(answer)
        found = await asyncio.wrap_future(answer)
        return [replace(p, path=n, top=p.top[:top]) for p, n in zip(found, names, strict=True)], model

    async def model(self) -> Response:
        """Tasks, classes, dates, ranks and bases per layer, bytes per part."""
        model = self.source.current
        return _json(model.about, model.generation)

    async def health(self) -> Response:
        """Whether requests are answered, which generation is served, and whether a newer one was refused."""
        newest = "refused" if self.source.refused is not None else "served"
        generation = self.source.current.generation
        still = self.admission.busy and time.monotonic() - self._progress > _STALLED
        about = {"status": "stalled" if still else "ok", "generation": generation, "newest": newest}
        return _json(about, generation, 503 if still else 200)

    def _progressed(self, _: object = None) -> None:
        """A request has come a step further, or the first one begins."""
        self._progress = time.monotonic()

    async def text(self) -> Response:
        """Requests, forward passes, waiting requests, generations, memory."""
        now = {
            "requests_waiting": ("gauge", "predictions in progress", float(self.admission.busy)),
            "generations_taken_total": ("counter", "new generations served", float(self.source.taken)),
            "generations_refused_total": (
                "counter",
                "new generations that could not be served",
                float(self.source.refusals),
            ),
            "resident_bytes": ("gauge", "memory of the process", prometheus.resident_bytes()),
        }
        body = self.metrics.text(now, self.source.current.generation)
        return Response(body, media_type=prometheus.TEXT)


class _Busy:
    """A place in the queue: given back once the request has ended and no thread works for it any more."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave, self._open = leave, 1

    def until(self, work: Future[Any]) -> None:
        """Keeps the place until a future is done; a thread cannot be stopped, only waited for."""
        self._open += 1
        loop = asyncio.get_running_loop()

        def over(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.done)

        work.add_done_callback(over)

    def done(self) -> None:
        """The request has ended, or a thread's work for it."""
        self._open -= 1
        if not self._open:
            self._leave()


def _add_refusals(app: FastAPI) -> None:
    """Every error is one JSON document with one sentence."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _json({"error": error.sentence}, status=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        sentences = {
            404: f"there is no {request.url.path}; the paths are {', '.join(PATHS)}.",
            405: f"{request.url.path} does not take {request.method}; see /docs.",
        }
        sentence = sentences.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return _json({"error": sentence}, status=error.status_code, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _json({"error": f"{first['loc'][-1]}: {first['msg']}; see /docs."}, status=422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _json({"error": "the client has gone."}, status=400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _json({"error": "internal error; the server goes on, its log says more."}, status=500)


def _json(
    content: Any, generation: str | None = None, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    body = json.dumps(finite(content), allow_nan=False).encode()
    own = {} if generation is None else {_GENERATION: generation}
    return Response(body, status, own | (headers or {}), "application/json")


_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "predictions: path, class, probability, task, task_confidence, unknown, top"},
    400: {"description": "not an image, a truncated one, or no image at all"},
    401: {"description": "the token is missing or wrong"},
    413: {"description": "too many bytes, pixels or images"},
    422: {"description": "a parameter out of its range"},
    429: {"description": "too many requests are waiting; Retry-After says when to come again"},
    503: {"description": "the request took too long, or, from /health, no request comes to its end"},
}
