"""Second moments of what enters the adapted projections, summed in a stream during passes without gradients.

Token features are never stored: each batch adds ``x^T x`` to an fp64 sum, which is divided once by the number
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from duallora.adapters.lora import AdaptedQKV


class Moment:
    """``S = sum(x^T x) / n`` over rows; sums of several batches (or ranks) add up to the moment of all rows.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        self.total = torch.zeros(dim, dim, dtype=torch.float64)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Adds rows of shape (..., d)."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.total += (flat.T @ flat).cpu().double()  # not every device has fp64
        self.rows += flat.shape[0]

    @property
    def value(self) -> Tensor:
        """The moment (d, d), fp64."""
        return self.total / max(self.rows, 1)


class TokenReader:
    """What stands for an image inside a layer: the class token, or the mean patch token at layer 0.

    Args:
        has_class_token: whether the first token is a class token.
        prefix: number of tokens before the patch tokens (class, distillation and register tokens).
    """

    def __init__(self, has_class_token: bool, prefix: int) -> None:
        self.has_class_token = has_class_token
        self.prefix = prefix

    def summary(self, x: Tensor, layer: int) -> Tensor:
        """(B, N, d) -> (B, d), fp32; the mean patch token at layer 0, where the class token is a constant."""
        if self.has_class_token and layer > 0:
            return x[:, 0].float()
        return x[:, self.prefix :].float().mean(1)

    def description(self, x: Tensor, layer: int) -> Tensor:
        """(B, N, d) -> (B, m d), fp32: :meth:`summary`, beside it the mean patch token unless it is that."""
        summary = self.summary(x, layer)
        if self.parts(layer) == 1:
            return summary
        return torch.cat([summary, x[:, self.prefix :].float().mean(1)], 1)

    def parts(self, layer: int) -> int:
        """The m of :meth:`description`."""
        return 2 if self.has_class_token and layer > 0 else 1

    def pooled_inputs(self, attention: nn.Module, x: Tensor, qkv: Tensor, layer: int) -> Tensor:
        """``softmax(q_cls K^T) X`` of every head (B * heads, d): what v of the class token is made of."""
        batch, tokens, dim = x.shape
        heads = int(attention.num_heads)  # type: ignore[arg-type]
        q, k, _ = qkv.float().reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator]
        speaks = self.has_class_token and layer > 0
        first = q[:, :, :1] if speaks else q[:, :, self.prefix :].mean(2, keepdim=True)
        weights = (first @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, 1, N)
        pooled: Tensor = weights.squeeze(2) @ x.float()
        return pooled.reshape(-1, dim)


@contextmanager
def gather_moments(
    adapted: Mapping[int, AdaptedQKV], attentions: Mapping[int, nn.Module], reader: TokenReader, kind: str
) -> Iterator[dict[tuple[int, str], Moment]]:
    """Gathers the moments of every group of every adapted layer while the model runs inside the context.

    Args:
        adapted: wrapped projections by layer.
        attentions: the attention modules they belong to, by layer.
        reader: how to read the class token.
        kind: ``"tokens"`` (all tokens, InfLoRA's reading) or ``"class_token"`` (the paper's: the class
            token's input for q, attention-pooled inputs for v; k always uses all tokens, because every patch
            key moves with it).

    Yields:
        Moments by (layer, group); complete once the context is left.
    """
    moments = {(layer, group): Moment(m.dim) for layer, m in adapted.items() for group in m.groups}

    def hook(layer: int) -> object:
        def rows(x: Tensor, output: Tensor, group: str) -> Tensor:
            if kind == "tokens" or group == "k":
                return x
            if group == "q":
                return reader.summary(x, layer)
            return reader.pooled_inputs(attentions[layer], x, output, layer)

        def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            # A moment summed in bf16 would lose its small directions.
            with torch.autocast(x.device.type, enabled=False):
                for group in adapted[layer].groups:
                    moments[layer, group].add(rows(x, output.detach(), group))

        return adapted[layer].register_forward_hook(read)

    handles = [hook(layer) for layer in adapted]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
