"""Attention computed step by step, where a single fused call has no weights to show or is the slower one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MOST_TOKENS = 1024
"""Up to so many tokens the weights of all pairs (fp32) are held; beyond, they would take too much memory."""


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(Q K^T / sqrt(d) + mask)`` (B, heads, N, N), as `F.scaled_dot_product_attention` has it.

    Args:
        query: (B, heads, N, d).
        key: (B, heads, N, d).
        attn_mask: added to the scores, or, of booleans, False where a token is not seen.
        scale: in place of ``1 / sqrt(d)``.
    """
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if hidden else scores + attn_mask
    return scores.softmax(-1)


class StepByStep(TorchFunctionMode):
    """Inside ``with``, attention in bf16 takes products and a softmax in place of the fused call.

    On a processor with instructions for bf16 products, the fused call of PyTorch 2.14 does not use them in
    its backward pass: at 65 tokens it takes 7 times as long (``benchmarks/attention.py``). In this thread
    alone; other calls are left as they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stands for every function of torch that is called inside."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    special = dropout_p or is_causal or any(others.values())
    if query.dtype != torch.bfloat16 or special or key.shape[-2] > MOST_TOKENS:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others
        )
    return attention_weights(query, key, attn_mask, scale).to(value.dtype) @ value
