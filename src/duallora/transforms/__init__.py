"""How images are prepared, under the name that callers import it by; it lives in ``duallora.data``."""

from __future__ import annotations

from duallora.data.transforms import Augmentation, evaluation_transform

__all__ = ["Augmentation", "evaluation_transform"]
