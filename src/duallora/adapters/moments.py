"""Second moments of what enters the adapted projections, summed in a stream during passes without gradients.

Token features are never stored: each batch adds ``x^T x`` to an fp64 sum, which is divided once by the number
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from duallora.adapters.dual_lora import AdaptedQKV
from duallora.errors import DualLoRAError
from duallora.runtime import parallel

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone
from duallora.backbones.compiling import uncompiled


class Moment:
    """``S = sum(x^T x) / n`` over rows; sums of several batches (or ranks) add up to the moment of all rows.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.rows = dim, 0
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Adds rows of shape (..., d)."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        product = flat.T @ flat
        # It stays where it is computed if there is fp64: copies would make a GPU wait for every batch.
        product = (product.cpu() if product.device.type == "mps" else product).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.rows += flat.shape[0]

    def join(self) -> None:
        """Adds up what the processes have summed over their shares of the images."""
        self._sum = parallel.total(self.total)
        self.rows = int(parallel.total(torch.tensor([self.rows])))

    @property
    def total(self) -> Tensor:
        """``sum(x^T x)`` (d, d), fp64, on the CPU."""
        return torch.zeros(self.dim, self.dim, dtype=torch.float64) if self._sum is None else self._sum.cpu()

    @property
    def value(self) -> Tensor:
        """The moment (d, d), fp64, on the CPU."""
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


def check_moments(backbone: Backbone, kind: str) -> None:
    """Refuses moments that cannot be read off the projections of a backbone.

    Raises:
        DualLoRAError: ``"class_token"`` where an attention weighs tokens by more than its queries and keys.
    """
    attentions = {layer: backbone.attention(layer) for layer in range(backbone.depth)}
    _check_attentions(attentions, kind, backbone.info.name)


def _check_attentions(attentions: Mapping[int, nn.Module], kind: str, name: str) -> None:
    foreign = [type(a).__name__ for a in attentions.values() if type(a) is not Attention]
    if kind == "class_token" and foreign:
        raise DualLoRAError(
            f"{name} weighs tokens by their places too (attention {foreign[0]} of timm), so that class-token "
            "moments cannot be read off its projections; take --method.moments tokens."
        )


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

    Raises:
        DualLoRAError: ``"class_token"`` where :func:`check_moments` refuses it.
    """
    _check_attentions(attentions, kind, "the backbone")
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
        with uncompiled():
            yield moments
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    for moment in moments.values():
        moment.join()
