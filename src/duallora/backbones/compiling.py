"""Compiling a frozen backbone: batches of any size, images of one, and what to do when a compiler fails."""

from __future__ import annotations

import warnings

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


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiler raises when it cannot do it; not what the code raises that it compiles."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return TorchDynamoException, CppCompileError


def tell_uncompiled(error: Exception) -> None:
    """Says in one sentence that it goes on without the compiler."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(f"torch.compile failed and is left out from here on: {said[:200]}", stacklevel=3)
