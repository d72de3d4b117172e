"""Reading images: every format comes out as plain 8-bit RGB, or as one sentence that names the file."""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from duallora.data.folder_walk import walk
from duallora.data.unreadable import foreign_kind, remedy
from duallora.errors import DualLoRAError

MAX_PIXELS: int = 178_956_970
"""Images with more pixels than this are refused before they are decoded."""

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"}
    | {".tga", ".tif", ".tiff", ".webp"}
)
"""File name endings, in lower case, that count as images when a folder is walked."""

# Pillow also opens PostScript (by starting an interpreter) and formats nobody trains on: those stay shut.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
_SYSTEM_FOLDERS = frozenset({"__MACOSX"})
_ORIENTATION_TAG = 0x0112
_HEAD = 512  # bytes that tell what a file is
_PILLOW = re.compile(r"PIL\.")


class TooManyPixels(DualLoRAError):
    """An image is larger than what is decoded."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file of any common kind.

    Animations give their first frame, transparency is laid on white, 16-bit grey is scaled to 8 bits, grey of
    more bits or in floating point by the range that its values take, and the camera's orientation is applied.

    Args:
        path: the image file.

    Returns:
        A decoded ``RGB`` image without metadata.

    Raises:
        DualLoRAError: the file is missing, too large (more than ``MAX_PIXELS``) or not a readable image;
            the message names it.
    """
    try:
        return _read(path, str(path), MAX_PIXELS)
    except FileNotFoundError as error:
        raise DualLoRAError(f"{path} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise DualLoRAError(f"{path} is a folder, not an image: name the files in it") from error
    except PermissionError as error:
        raise DualLoRAError(f"{path} may not be read: change its permissions") from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the bytes of an image file, as :func:`read_image` does a file.

    Args:
        data: of the file.
        name: what the messages call it.
        max_pixels: images with more are refused before they are decoded; at most ``MAX_PIXELS``.

    Raises:
        TooManyPixels: the image is too large.
        DualLoRAError: it is not a readable image; the message names it.
    """
    return _read(io.BytesIO(data), name, min(max_pixels, MAX_PIXELS))


def to_pil(image: Image.Image | torch.Tensor | str | Path) -> Image.Image:
    """Turns what a data set or a caller hands over into an ``RGB`` image.

    Args:
        image: a PIL image of any mode, a path, or a tensor of shape (C, H, W) or (H, W) with one or three
            channels: uint8, or floating point in [0, 1] (not normalised).

    Raises:
        DualLoRAError: the image cannot be read, or the tensor has another shape, type or range.
    """
    if isinstance(image, Image.Image):
        if type(image) is Image.Image and image.mode == "RGB" and not image.info:
            return image
        _refuse_huge(image, "the image")
        try:
            return _plain_rgb(image)
        except Exception as error:
            raise DualLoRAError(f"the image cannot be decoded ({error}): pass another one") from error
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    if isinstance(image, (str, Path)):
        return read_image(image)
    raise DualLoRAError(f"an image must be a PIL image, a tensor or a path, not {type(image).__name__}")


def find_images(folder: Path) -> list[Path]:
    """Finds the image files below a folder, by their endings, sorted; hidden files are left out.

    Raises:
        DualLoRAError: there is no such folder.
    """
    return [path for path in find_files(folder) if is_image_name(path)]


def find_files(folder: Path) -> list[Path]:
    """Finds all files below a folder, sorted; hidden ones and those an operating system drops are left out.

    Links to folders are followed, and each folder comes once: see :func:`walk`.

    Raises:
        DualLoRAError: there is no such folder, or one in it may not be read.
    """
    require_folder(folder)
    found = []
    for parent, files in walk(folder, _is_walked, _refuse_unread):
        found += [f"{parent}/{name}" for name in files if not _is_hidden(name)]
    return [Path(name) for name in sorted(found)]


def is_image_name(path: Path) -> bool:
    """Whether the file name ends like an image's."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def require_folder(folder: Path) -> None:
    """Refuses a path that is not an existing folder.

    Raises:
        DualLoRAError: it does not exist or is a file.
    """
    if not folder.exists():
        raise DualLoRAError(f"the folder {folder} does not exist: check the path")
    if not folder.is_dir():
        raise DualLoRAError(f"{folder} is a file: a folder of images is needed")


def _is_walked(name: str) -> bool:
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def _refuse_unread(error: OSError) -> None:
    """A folder passed over in silence would be images lost in silence."""
    raise DualLoRAError(
        f"the folder {error.filename} cannot be read ({error.strerror or error}): change its permissions or "
        "take it out"
    ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _hush_pillow() -> None:
    """Whatever the decoder grumbles about and then decodes all the same is a readable image.

    For good and for the whole process, but for Pillow alone: ``catch_warnings`` restores what it found, so of
    several threads that read one could leave the others' silence behind.
    """
    first: list[Any] = list(warnings.filters[:1])
    if not first or first[0][3] != _PILLOW:  # changing the filters makes Python repeat warnings shown once
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _read(source: str | Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        _hush_pillow()
        with Image.open(source, formats=_formats()) as image:
            _refuse_huge(image, name, max_pixels)
            return _plain_rgb(image)
    except (DualLoRAError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(_too_many_pixels(name, max_pixels)) from error
    except UnidentifiedImageError as error:
        known = _foreign(source, name)
        raise known or DualLoRAError(
            f"{name} is not an image in a known format: repair or remove it"
        ) from error
    # Malformed files make the decoders raise nearly anything (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        known = _foreign(source, name)
        raise known or DualLoRAError(f"{name} cannot be decoded ({error}): repair or remove it") from error


def _foreign(source: str | Path | io.BytesIO, name: str) -> DualLoRAError | None:
    """The sentence about a file of a kind that is not read here; None where it is only broken."""
    try:
        if isinstance(source, (str, Path)):
            with Path(source).open("rb") as file:
                head = file.read(_HEAD)
        else:
            source.seek(0)
            head = source.read(_HEAD)
    except OSError:
        return None
    kind = foreign_kind(head)
    if kind is None or kind in Image.OPEN:  # AVIF, where Pillow has it: then it is only broken
        return None
    return DualLoRAError(f"{name} is {kind}, which is not read here: {remedy(kind)}")


def _too_many_pixels(what: str, most: int) -> str:
    return f"{what} has more than {most:,} pixels and is not decoded: make it smaller first"


def _refuse_huge(image: Image.Image, what: str, most: int = MAX_PIXELS) -> None:
    if image.width * image.height > most:
        raise TooManyPixels(_too_many_pixels(what, most))


def _plain_rgb(image: Image.Image) -> Image.Image:
    image = _to_rgb(_upright(image))
    # A copy is free of the file; without metadata nothing (such as the orientation) can be applied twice.
    plain = image.copy()
    plain.info = {}
    return plain


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not make the pixels unreadable; broken pixels fail below
        image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        return _from_deep_grey(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        image = background
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PPM":
        # 16 bits by their format: the upper byte, which is what the decoder itself takes of 16-bit colour.
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return Image.fromarray(_to_byte(grey.astype(np.float32))).convert("RGB")


def _to_byte(grey: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Values of any range as 0 to 255: nothing but the values themselves says what range is meant.

    From 0 to 1 or 255 where all values lie there, and else to the largest number of as many bits as the
    largest value has; from the smallest value to the largest where there are negative ones. Floating point
    that goes a little over 1, as after a resize, is cut there.
    """
    finite = grey[np.isfinite(grey)]
    if not finite.size:
        return np.zeros(grey.shape, np.uint8)
    low, high = min(float(finite.min()), 0.0), float(finite.max())
    grey = np.nan_to_num(grey, nan=0.0, posinf=high, neginf=low) - low
    high -= low
    if low < 0:
        top = high or 1.0
    elif high < 2:
        top = 1.0
    else:
        top = 2.0 ** max(8, math.floor(math.log2(high)) + 1) - 1
    return (grey * (255 / top)).round().clip(0, 255).astype(np.uint8)


def _from_tensor(tensor: torch.Tensor) -> Image.Image:
    pixels = tensor.detach().cpu()
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        shape = tuple(tensor.shape)
        raise DualLoRAError(
            f"an image tensor must be (1 or 3, height, width) or (height, width), not {shape}"
        )
    if pixels.is_floating_point():
        if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):  # also refuses NaN
            raise DualLoRAError(
                "a floating-point image tensor must lie in [0, 1]: hand images over before normalisation"
            )
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DualLoRAError(f"an image tensor must be uint8 or floating point in [0, 1], not {tensor.dtype}")
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
