"""What a method gets from the place where it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from duallora.backbones.frozen_features import FrozenFeatures


@dataclass(frozen=True)
class MethodContext:
    """Precision and caches of a method, given when it is made.

    Attributes:
        autocast: precision of the backbone in passes over a task and in training; all else runs in fp32.
        reading: the same in readouts: fp32, because bf16 would round by batch size; a measurement may ask.
        cache: features of the bare backbone by image; None computes them all.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache: FrozenFeatures | None = None


ALONE = MethodContext()
"""Everything in fp32 and nothing cached: where no learner says otherwise."""
