"""Reading a request: its body within the limits, and the images in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from torch import Tensor

from duallora.data.decoding import Decoders
from duallora.data.images import TooManyPixels
from duallora.errors import DualLoRAError
from duallora.serving.limits import Limits, Refused

_CHUNK = 1 << 16
_MOST_FIELDS = 16


class Upload(NamedTuple):
    """An image of a request: the name of its file, if it has one, and its bytes."""

    name: str | None
    data: bytes


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body; what comes after a refusal is thrown away by the server unread.

    Raises:
        Refused: it is larger than the limit, which a declared length says before it comes.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise limits.body_refused()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body_bytes:
            raise limits.body_refused()
    return bytes(body)


async def images_of(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    """The images in a body: all files of a multipart form, or the body itself.

    Raises:
        Refused: there is none, there are too many, or the form is malformed.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        if not body:
            raise Refused(400, "the request has no body; send the bytes of an image, or a multipart form.")
        return [Upload(None, body)]
    parser = MultiPartParser(
        request.headers, _pieces(body), max_files=limits.max_images, max_fields=_MOST_FIELDS
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise limits.images_refused() from error
        raise Refused(400, f"the multipart form cannot be read ({error.message.rstrip('.')}).") from error
    except Exception as error:  # a form without a boundary, and what else parsers stumble over
        raise Refused(400, "the multipart form cannot be read; is its boundary in Content-Type?") from error
    try:
        parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        uploads = [Upload(part.filename or None, await part.read()) for part in parts]
    finally:
        await form.close()
    if not uploads:
        raise Refused(400, "the form has no image; send each as a file, for instance -F image=@photo.jpg.")
    return uploads


def decoded(
    uploads: Sequence[Upload],
    preprocess: Callable[[Image.Image], Tensor],
    decoders: Decoders,
    until: float | None = None,
) -> Tensor:
    """The images as a model takes them (n, 3, H, W).

    Args:
        uploads: of one request.
        preprocess: an RGB image as the model takes it (3, H, W).
        decoders: that decode it.
        until: moment of ``time.monotonic`` at which the request is given up.

    Raises:
        Refused: one is not a readable image or too large; it is named.
    """
    tensors = []
    for number, upload in enumerate(uploads, 1):
        name = f"image {number}" + (f" ({upload.name})" if upload.name else "")
        try:
            tensors.append(preprocess(decoders.decode(upload.data, name, until)))
        except TooManyPixels as error:
            raise Refused(413, f"{error}.") from error
        except DualLoRAError as error:
            raise Refused(400, f"{error}.") from error
    return torch.stack(tensors)


async def _pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    """The body bit by bit: other requests go on while a large form is taken apart."""
    for start in range(0, len(body), _CHUNK):
        yield body[start : start + _CHUNK]
        await asyncio.sleep(0)
    yield b""
