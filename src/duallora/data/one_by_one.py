"""What a caller hands over to be looked at, as one image after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from duallora.errors import DualLoRAError

_ONE = "hand over one image (a PIL image, a path, a tensor (C, H, W)) or a list of them"


def one_by_one(images: Any) -> Iterator[Any]:
    """Goes through images as they come and holds none of them.

    Args:
        images: an iterable of images, or a data set with a length and an index. A PIL image, a path or a
            tensor of shape (H, W), (1, H, W) or (3, H, W) is one image; a tensor (N, C, H, W) is N.

    Raises:
        DualLoRAError: it is neither an image nor anything to go through.
    """
    if isinstance(images, (str, Path, Image.Image)):
        return iter([images])
    if isinstance(images, torch.Tensor):
        return _of_tensor(images)
    if isinstance(images, np.ndarray) and images.dtype.kind in "UO":  # paths
        return iter(images.tolist())
    if isinstance(images, (np.ndarray, np.generic, bytes, bytearray, memoryview, dict)):
        raise DualLoRAError(f"images cannot be handed over as {type(images).__name__}: {_ONE}")
    if isinstance(images, Iterable):
        return iter(images)
    # A data set may answer to any index; its length says where it ends.
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return (images[i] for i in range(len(images)))
    raise DualLoRAError(f"there are no images in {type(images).__name__}: {_ONE}")


def _of_tensor(images: torch.Tensor) -> Iterator[torch.Tensor]:
    if images.ndim == 2 or (images.ndim == 3 and images.shape[0] in (1, 3)):
        return iter([images])
    if images.ndim == 4:
        return iter(images)
    raise DualLoRAError(
        f"a tensor of shape {tuple(images.shape)} is not one image, which is (1 or 3, H, W), nor a batch of "
        "them, which is (N, C, H, W)"
    )
