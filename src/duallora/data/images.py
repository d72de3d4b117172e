"""Reading images: every format comes out as plain 8-bit RGB, or as one sentence that names the file."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from duallora.data.encodings import format_of, refuse_costly
from duallora.data.folder_walk import walk
from duallora.data.tiff import refuse_exif
from duallora.data.unreadable import foreign_kind, remedy
from duallora.errors import DualLoRAError
from duallora.storage.regular import open_regular, refuse_kernel, refuse_special

if TYPE_CHECKING:
    import torch

MAX_PIXELS: int = 178_956_970
"""Images with more pixels than this are refused before they are decoded."""

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"}
    | {".tga", ".tif", ".tiff", ".webp"}
)
"""File name endings, in lower case, that count as images when a folder is walked."""

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
_SYSTEM_FOLDERS = frozenset({"__MACOSX"})
_ORIENTATION_TAG = 0x0112
_MOST_RAW = 1 << 17  # letters of the older form of Exif in a PNG
_HEAD = 512  # bytes that tell what a file is
_PILLOW = re.compile(r"PIL\.")


class TooManyPixels(DualLoRAError):
    """An image is larger than what is decoded."""


def read_image(path: str | Path, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file of any common kind.

    Animations give their first frame, transparency is laid on white, 16-bit grey is scaled to 8 bits, grey of
    more bits or in floating point by the range that its values take, and the camera's orientation is applied.

    Args:
        path: the image file.
        name: what the messages call it; by default the path.
        max_pixels: images with more are refused before they are decoded; at most ``MAX_PIXELS``.

    Returns:
        A decoded ``RGB`` image without metadata.

    Raises:
        DualLoRAError: the file is missing, too large (more than ``MAX_PIXELS``) or not a readable image;
            the message names it.
    """
    name = str(path) if name is None else name
    try:
        with open_regular(path) as file:
            return _read(file, name, min(max_pixels, MAX_PIXELS))
    except FileNotFoundError as error:
        raise DualLoRAError(f"{name} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise DualLoRAError(f"{name} is a folder, not an image: name the files in it") from error
    except PermissionError as error:
        raise DualLoRAError(f"{name} may not be read: change its permissions") from error


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
    if isinstance(image, (str, Path)):
        return read_image(image)
    import torch  # not above: the helper that decodes has no use for it, and it takes seconds

    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
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
        DualLoRAError: there is no such folder, one in it may not be read, or holds a pipe, a socket or a
            device.
    """
    require_folder(folder)
    found = []
    for parent, files in walk(folder, _is_walked, _refuse_unread):
        kept = [name for name in files if not _is_hidden(name)]
        refuse_special(parent, kept)
        found += [f"{parent}/{name}" for name in kept]
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
    refuse_kernel(folder)


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


def _hush_pillow() -> None:
    """Whatever the decoder grumbles about and then decodes all the same is a readable image.

    For good and for the whole process, but for Pillow alone: ``catch_warnings`` restores what it found, so of
    several threads that read one could leave the others' silence behind.
    """
    first: list[Any] = list(warnings.filters[:1])
    if not first or first[0][3] != _PILLOW:  # changing the filters makes Python repeat warnings shown once
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
        _hush_libtiff()


def _hush_libtiff() -> None:
    """What libtiff grumbles about, it prints itself, unless it is given no function to do so."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(importlib.import_module("PIL._imaging").__file__)
        for kind in ("Error", "Warning"):
            for form in ("", "Ext"):
                handler = getattr(library, f"TIFFSet{kind}Handler{form}")
                handler.argtypes, handler.restype = (ctypes.c_void_p,), ctypes.c_void_p
                handler(None)


def _read(source: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        _hush_pillow()
        kind = format_of(source)
        if kind is None or not _is_readable(kind):
            raise UnidentifiedImageError
        refuse_costly(source, kind, name)
        # This format alone: Pillow also opens PostScript, by starting an interpreter, and much else.
        with Image.open(source, formats=(kind,)) as image:
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
    except MemoryError as error:
        raise DualLoRAError(f"{name} cannot be decoded, for there is not enough memory: free some") from error
    # Malformed files make the decoders raise nearly anything (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        known = _foreign(source, name)
        raise known or DualLoRAError(f"{name} cannot be decoded ({error}): repair or remove it") from error


def _foreign(source: BinaryIO, name: str) -> DualLoRAError | None:
    """The sentence about a file of a kind that is not read here; None where it is only broken."""
    try:
        source.seek(0)
        head = source.read(_HEAD)
    except (OSError, ValueError):  # Pillow may have closed it
        return None
    kind = foreign_kind(head)
    if kind is None or kind in Image.OPEN:  # AVIF, where Pillow has it: then it is only broken
        return None
    return DualLoRAError(f"{name} is {kind}, which is not read here: {remedy(kind)}")


def _is_readable(kind: str) -> bool:
    """Whether the decoder of a format is there; Pillow can be built without some."""
    if kind not in Image.OPEN:
        Image.init()
    return kind in Image.OPEN


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
        if _is_costly_exif(image):
            return image
        if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not make the pixels unreadable; broken pixels fail below
        image.load()
    return image


def _is_costly_exif(image: Image.Image) -> bool:
    """Whether the metadata could take gigabytes to read; what lies behind the pixels is there then."""
    if image.format == "PNG":
        image.load()
        return len(image.info.get("Raw profile type exif", "")) > _MOST_RAW or _is_costly_block(image)
    return _is_costly_block(image)


def _is_costly_block(image: Image.Image) -> bool:
    exif = image.info.get("exif")
    return isinstance(exif, bytes) and refuse_exif(exif) is not None


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
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode != "F"):
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
    import torch

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
