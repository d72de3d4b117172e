"""Compiling a frozen backbone: batches of any size, images of one, and what to do when a compiler fails."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def any_batch(images: Tensor) -> None:
    """Tells the compiler that batches have other sizes too, and that height and width stay.

    With every size unknown, the sizes behind a convolutional stem are powers and quotients of symbols, which
    inductor cannot always work with.

    Args:
        images: that the compiled code is about to get (B, 3, H, W).
    """
    torch._dynamo.maybe_mark_dynamic(images, 0)


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled models run as they are written: what was compiled does not notice new hooks."""
    # Nothing can have been compiled before this module is there, and importing it takes seconds.
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiler raises when it cannot do it; not what the code raises that it compiles."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return TorchDynamoException, CppCompileError


def tell_uncompiled(error: Exception) -> None:
    """Says in one sentence that it goes on without the compiler."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(f"torch.compile failed and is left out from here on: {said[:200]}", stacklevel=3)
