"""One look at a file that was given: whether it is an image, and what it is compared with others by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from duallora.app.uploads import Found
from duallora.data.decoding import Read
from duallora.data.images import is_image_name, read_image
from duallora.data.unreadable import kind_of_file, remedy
from duallora.errors import DualLoRAError
from duallora.storage.atomic import sha256_of

_FLAT = 4.0  # of 255: below this spread a picture has no structure that a hash could tell apart


@dataclass(frozen=True)
class Seen:
    """One file, looked at.

    Attributes:
        path: where it is.
        name: as it is shown.
        digest: sha256 of its bytes.
        reason: why it cannot be read; None where it can.
        hash: its 8 x 8 difference hash (64,) as 0 and 1; None where it has no structure or cannot be read.
        thumbnail: 8 x 8 pixels (192,), 0 to 255; None where it cannot be read.
    """

    path: Path
    name: str
    digest: str
    reason: str | None
    hash: np.ndarray | None = None
    thumbnail: np.ndarray | None = None

    @classmethod
    def at(cls, found: Found, read: Read = read_image) -> Seen:
        """Reads and decodes a file once, with ``read``."""
        name = found.parts[-1]
        try:
            digest = sha256_of(found.path)
        except DualLoRAError as error:
            return cls(found.path, name, "", str(error).removeprefix(f"{found.path} "))
        except OSError as error:
            return cls(found.path, name, "", f"it could not be read ({error.strerror or error})")
        try:
            image = opened(found.path, read)
        except DualLoRAError as error:
            return cls(found.path, name, digest, str(error))
        return cls(found.path, name, digest, None, difference_hash(image), thumbnail(image))


def opened(path: Path, read: Read = read_image) -> Image.Image:
    """An image file, decoded.

    Raises:
        DualLoRAError: why it cannot be read; the sentence does not name the file.
    """
    if not is_image_name(path):
        kind = kind_of_file(path)
        raise DualLoRAError(
            f"it is {kind}, which is not read here: {remedy(kind)}"
            if kind
            else "it is not an image by its name"
        )
    try:
        return read(path)
    except DualLoRAError as error:
        raise DualLoRAError(str(error).removeprefix(f"{path} ")) from error


def difference_hash(image: Image.Image) -> np.ndarray | None:
    """The 8 x 8 difference hash (64,) as 0 and 1; None where the picture has no structure."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    if float(grey.std()) < _FLAT:
        return None
    return (grey[:, 1:] > grey[:, :-1]).astype(np.float32).reshape(-1)


def thumbnail(image: Image.Image) -> np.ndarray:
    """8 x 8 pixels (192,), 0 to 255."""
    small = image.resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)
