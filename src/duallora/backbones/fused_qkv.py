"""Makes every attention of a ViT call one fused ``qkv`` layer: the only place where adapters are put.

Some of timm's attentions keep the biases of q and v beside ``qkv`` and multiply by ``qkv.weight`` themselves,
which bypasses a wrapper without any error; some have three projections. Their own forward pass also knows a
third way: without separate biases and projections it calls ``qkv``. So the same numbers are laid out as one
``nn.Linear``, timm's code stays the one that computes, and a probe shows that it does call the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_BIASES = ("q_bias", "k_bias", "v_bias")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def fuse(attention: nn.Module) -> str | None:
    """Lays the projections of an attention out as one ``nn.Linear`` with a bias, named ``qkv``.

    An attention that has such a layer stays as it is; the function of the others changes by no more than
    the rounding of a sum.

    Args:
        attention: a timm attention; changed in place.

    Returns:
        Why the attention cannot have such a layer (it is unchanged then), or None.
    """
    if getattr(attention, "gate", None) is not None:
        return "no adapter covers the projection of its gate"
    apart = [getattr(attention, name, None) for name in _PROJECTIONS]
    parts = [part for part in apart if isinstance(part, nn.Linear)]
    if len(parts) == 3:
        if len({part.weight.shape for part in parts}) > 1:
            return "its keys and values have fewer heads than its queries"
        attention.qkv = _stacked(parts)
        for name in _PROJECTIONS:
            setattr(attention, name, None)
        return None
    qkv = attention.qkv
    if type(qkv) is not nn.Linear:
        return f"its qkv is a {type(qkv).__name__}, and only a plain Linear can be wrapped"
    biases = [getattr(attention, name, None) for name in _BIASES]
    if any(bias is not None for bias in biases):
        attention.qkv = _linear(qkv.weight, _joined(biases, qkv.out_features // 3, qkv.weight))
        for name in _BIASES:
            setattr(attention, name, None)
    return None


def calls_qkv(attention: nn.Module) -> bool:
    """Whether a pass of the attention calls ``qkv`` once, on all tokens, and reads nothing else of it."""
    qkv = attention.get_submodule("qkv")
    weight: Tensor = qkv.weight  # type: ignore[assignment]
    probe = _Probe(weight.shape[0])
    attention.qkv = probe
    try:
        with torch.no_grad():
            attention(weight.new_zeros(1, _tokens(attention), weight.shape[1]))
    except _FOREIGN:  # the probe has no weight and no bias: whoever reads them fails
        return False
    finally:
        attention.qkv = qkv
    return probe.calls == 1


_FOREIGN = (AttributeError, TypeError, RuntimeError, ValueError)


class _Probe(nn.Module):
    """Stands where ``qkv`` stands, and is nothing but callable."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.calls = width, 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, 3 d_out), zeros."""
        self.calls += 1
        return x.new_zeros(*x.shape[:2], self.width)


def _tokens(attention: nn.Module) -> int:
    """How many tokens to probe with: a table of relative positions only goes with its own number."""
    window = getattr(attention, "window_size", None)
    return 2 if not window else int(window[0]) * int(window[1]) + 1


def _stacked(parts: Sequence[nn.Linear]) -> nn.Linear:
    weight, biases = torch.cat([part.weight for part in parts]), [part.bias for part in parts]
    if all(bias is None for bias in biases):
        return _linear(weight, None)
    return _linear(weight, _joined(biases, parts[0].out_features, weight))


def _joined(biases: Sequence[Tensor | None], width: int, like: Tensor) -> Tensor:
    return torch.cat([like.new_zeros(width) if bias is None else bias for bias in biases])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
