"""Features of the bare backbone for un-augmented images, computed once and kept on disk.

An image is known by the bytes of its preprocessed tensor, so that a wrong entry cannot be read whatever the
order, the stream or the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.errors import DualLoRAError
from duallora.storage.atomic import write_atomic
from duallora.storage.regular import read_regular

_DIGEST = 16  # bytes


class FrozenFeatures:
    """Features (n, d) by image.

    Args:
        keys: digests of the images (n, 16), uint8.
        features: (n, d), fp32.
    """

    def __init__(self, keys: Tensor, features: Tensor) -> None:
        self._features = features
        self._place = {bytes(key): i for i, key in enumerate(keys.numpy())}

    def __len__(self) -> int:
        return len(self._place)

    def lookup(self, images: Tensor) -> Tensor | None:
        """Features (n, d) of preprocessed images (n, 3, H, W) on the CPU; None unless all are known."""
        places = [self._place.get(_digest(image)) for image in images.cpu()]
        known = [place for place in places if place is not None]
        return self._features[known] if len(known) == len(places) else None

    @classmethod
    @torch.no_grad()
    def compute(cls, backbone: Backbone, batches: Iterable[Tensor]) -> FrozenFeatures:
        """Runs the backbone over batches of preprocessed images (B, 3, H, W); equal images once."""
        found: dict[bytes, Tensor] = {}
        device = next(backbone.parameters()).device
        for images in batches:
            features = backbone(images.to(device)).float().cpu()
            found |= {_digest(image): f for image, f in zip(images.cpu(), features, strict=True)}
        keys = torch.tensor([list(key) for key in found], dtype=torch.uint8)
        return cls(keys, torch.stack(list(found.values())))

    def save(self, path: Path) -> None:
        """Writes the features to a file."""
        keys = torch.tensor([list(key) for key in self._place], dtype=torch.uint8)
        write_atomic(path, safetensors.torch.save({"keys": keys, "features": self._features}))

    @classmethod
    def load(cls, path: Path, backbone: Backbone) -> FrozenFeatures:
        """Reads what :meth:`save` wrote.

        Raises:
            DualLoRAError: the file cannot be read, or its features are not as wide as the backbone's.
        """
        try:
            tensors = safetensors.torch.load(read_regular(path))
            keys, features = tensors["keys"], tensors["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DualLoRAError(
                f"{path} holds no features that can be read; delete it, or leave --features out."
            ) from error
        if features.shape[1:] != (backbone.row_dim,):
            raise DualLoRAError(
                f"{path} holds features of width {features.shape[-1]}, but those of {backbone.info.name} "
                f"have width {backbone.row_dim}: it is from another backbone or an earlier duallora; delete "
                "it, or leave --features out."
            )
        return cls(keys, features)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=_DIGEST).digest()
