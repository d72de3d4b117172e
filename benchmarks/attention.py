"""Milliseconds of one attention on this processor: the fused call beside products and a softmax.

    python benchmarks/attention.py

One thread, batches of 32, forward and backward, the best of ten. Where the fused call wins in bf16, a newer
PyTorch has mended it, and `duallora.runtime.attention.StepByStep` has become needless.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from duallora.runtime.attention import StepByStep
from duallora.storage.documents import markdown_table

SHAPES = {"embedded, 64 pixels": (3, 65, 64), "ViT-S/16, 224 pixels": (6, 197, 64)}
BATCH, TURNS = 32, 10


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    rows = []
    for name, (heads, tokens, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            made = [torch.randn(BATCH, heads, tokens, width, dtype=dtype) for _ in range(3)]
            fused = best(made)
            with StepByStep():  # leaves fp32 to the fused call
                stepwise = f"{best(made):.1f}" if dtype == torch.bfloat16 else "-"
            rows.append([name, str(dtype).removeprefix("torch."), f"{fused:.1f}", stepwise])
    print(f"torch {torch.__version__}")
    print(markdown_table(["", "precision", "fused", "step by step"], rows))


def best(made: list[torch.Tensor]) -> float:
    """Milliseconds of a forward and a backward pass."""
    query, key, value = (each.clone().requires_grad_() for each in made)
    found = []
    for _ in range(TURNS):
        start = time.perf_counter()
        F.scaled_dot_product_attention(query, key, value).sum().backward()
        found.append(time.perf_counter() - start)
    return 1000 * min(found)


if __name__ == "__main__":
    main()
