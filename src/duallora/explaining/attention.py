"""Attention weights of a forward pass, and how much of an answer they carry from each token.

timm computes attention in one fused call, which never holds the weights. For the pass that is looked at it is
computed step by step, in this thread alone: another thread's pass stays fused and is not noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from duallora.runtime.attention import attention_weights

_SOFTMAX = (Tensor.softmax, torch.softmax, F.softmax)


class AttentionWeights(TorchFunctionMode):
    """Inside ``with``, notes the attention weights of every pass that has gradients.

    Attributes:
        maps: (B, heads, N, N), in the order in which they were computed; an attention that pools all tokens
            into one is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stands for every function of torch that is called inside."""
        if func is F.scaled_dot_product_attention:
            return self._spelled_out(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        if func in _SOFTMAX and found.dim() == 4:  # where timm does not take the fused call
            self._note(found)
        return found

    def _spelled_out(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        weights = attention_weights(query, key, attn_mask, scale)
        self._note(weights)
        return weights.to(value.dtype) @ value

    def _note(self, weights: Tensor) -> None:
        if weights.requires_grad and weights.shape[-1] == weights.shape[-2]:
            self.maps.append(weights)


def relevance(maps: Sequence[Tensor], score: Tensor, depth: int, class_token: bool) -> Tensor:
    """How much every input token of an image speaks for a score, by gradient-weighted attention.

    In layer l, ``A_l' = mean over heads of (dscore/dA_l * A_l)^+``, and the layers add up as
    ``R = (I + A_L') ... (I + A_1')`` (Chefer, Gur and Wolf 2021, self-attention). Their relevance is the row
    of the class token. Answers here are read from other tokens too, and not every backbone has a class token:
    it is half that row and half the mean over all rows, or the mean alone. The rows of tokens that the answer
    does not read have no gradient.

    Args:
        maps: attention weights (1, heads, N, N) of one image, layer after layer; of several passes one after
            another.
        score: what is explained, of that image (); it depends on the maps.
        depth: layers of a pass.
        class_token: whether token 0 is one.

    Returns:
        (N,), at least 0; the tokens in the order of the first layer.
    """
    gradients = torch.autograd.grad(score, list(maps), allow_unused=True)
    weighted = [
        None if gradient is None else (gradient * each.detach()).clamp(min=0).mean(1)[0]
        for each, gradient in zip(maps, gradients, strict=True)
    ]
    passes = [weighted[start : start + depth] for start in range(0, len(weighted), depth)]
    found = [_through(layers, class_token) for layers in passes if any(layer is not None for layer in layers)]
    if not found:
        return torch.zeros(maps[0].shape[-1] if maps else 0)
    tokens = min(len(each) for each in found)
    return torch.stack([each[:tokens] for each in found]).sum(0)


def _through(layers: Sequence[Tensor | None], class_token: bool) -> Tensor:
    """Relevance (N,) of the tokens of one pass; extra tokens of a layer stand at the end."""
    there = [layer for layer in layers if layer is not None]
    tokens = len(there[-1])
    row = there[-1].new_full((tokens,), 1 / tokens)
    if class_token:
        row = row / 2
        row[0] += 0.5
    for layer in reversed(there):
        row = F.pad(row, (0, len(layer) - len(row)))  # a layer with more tokens than the one above, or fewer
        row = row + row @ layer
    return row
