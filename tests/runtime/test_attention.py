"""Attention step by step: the same answer as the fused call, taken in bf16 on a processor alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from duallora.runtime import attention
from duallora.runtime.attention import StepByStep, attention_weights
from duallora.runtime.compute import Compute


class Calls(TorchFunctionMode):
    """Counts fused calls that reach PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def tensors(dtype: torch.dtype = torch.float32, tokens: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(3)]


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"attn_mask": causal(7)}, {"attn_mask": torch.linspace(-1, 1, 49).view(7, 7)}],
    ids=["plain", "scale", "boolean mask", "added mask"],
)
def test_weights_give_what_the_fused_call_gives(options):
    query, key, value = tensors()
    found = attention_weights(query, key, **options) @ value
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, value, **options), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"attn_mask": causal(7)}, {"is_causal": True}, {"scale": 0.3}])
def test_bf16_agrees_with_fp32_and_so_do_its_gradients(options):
    exact = [each.requires_grad_() for each in tensors()]
    F.scaled_dot_product_attention(*exact, **options).square().sum().backward()
    rounded = [each.requires_grad_() for each in tensors(torch.bfloat16)]
    with StepByStep():
        F.scaled_dot_product_attention(*rounded, **options).float().square().sum().backward()
    for a, b in zip(exact, rounded, strict=True):
        assert (a.grad - b.grad.float()).norm() < 0.03 * a.grad.norm()


def fused_calls(dtype: torch.dtype, **options) -> int:
    with Calls() as calls, StepByStep():
        F.scaled_dot_product_attention(*tensors(dtype), **options)
    return calls.fused


def test_only_what_is_slow_is_taken_apart(monkeypatch):
    assert fused_calls(torch.bfloat16) == 0
    assert fused_calls(torch.bfloat16, is_causal=True) == 1
    assert fused_calls(torch.float32) == 1
    monkeypatch.setattr(attention, "MOST_TOKENS", 6)
    assert fused_calls(torch.bfloat16) == 1


@pytest.mark.parametrize(
    ("precision", "compiled", "fused"), [("bf16-mixed", False, 0), ("32", False, 1), ("bf16-mixed", True, 1)]
)
def test_a_machine_takes_it_in_bf16_and_leaves_compiled_passes_alone(precision, compiled, fused):
    machine = Compute("cpu", precision=precision).start()
    with Calls() as calls, machine.autocast(compiled):
        F.scaled_dot_product_attention(*tensors(torch.bfloat16))
    assert calls.fused == fused


def test_it_ends_with_the_block():
    with Compute("cpu", precision="bf16-mixed").start().autocast():
        pass
    with Calls() as calls:
        F.scaled_dot_product_attention(*tensors(torch.bfloat16))
    assert calls.fused == 1
