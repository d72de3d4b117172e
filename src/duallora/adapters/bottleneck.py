"""AdaptFormer's adapter: a narrow two-layer network beside the mlp; one for all tasks, or one a task.

"AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition" (NeurIPS 2022, arXiv 2205.13535).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duallora.adapters.lora import kaiming
from duallora.adapters.per_pass import PerPass


class Bottleneck(nn.Module):
    """``scale (relu(x D + b) U + c)``, which starts at zero.

    Args:
        dim: d, width of the tokens.
        rank: r, width of the bottleneck.
        scale: multiplies the output.
        generator: draws D (d x r) as LoRA does; b (r,), U (r x d) and c (d,) are zero.
    """

    def __init__(self, dim: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(kaiming(dim, rank, generator))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(rank, dim))
        self.up_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        hidden = (x @ self.down + self.down_bias).relu()
        return self.scale * (hidden @ self.up + self.up_bias)


class TaskBottlenecks(nn.Module):
    """Bottlenecks of one layer, one a task, of which a pass uses one: the same for all images or one each.

    Args:
        dim: d, width of the tokens.
        rank: r, width of a bottleneck.
        scale: multiplies the output.
        chosen: held around a pass by the method, and shared by all layers: the index of the bottleneck for
            all images, or one for each (B,); outside of one, nothing is added.
    """

    def __init__(self, dim: int, rank: int, scale: float, chosen: PerPass[int | Tensor]) -> None:
        super().__init__()
        self.dim, self.rank, self.scale, self.chosen = dim, rank, scale, chosen
        self.tasks = nn.ModuleList()

    def open(self, generator: torch.Generator, device: torch.device) -> Bottleneck:
        """Adds a bottleneck, which it returns, and freezes the earlier ones."""
        self.requires_grad_(False)
        opened = Bottleneck(self.dim, self.rank, self.scale, generator).to(device)
        self.tasks.append(opened)
        return opened

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, N, d) -> (B, N, d); None where no bottleneck is chosen."""
        chosen = self.chosen.get()
        if chosen is None:
            return None
        if isinstance(chosen, int):
            update: Tensor = self.tasks[chosen](x)
            return update
        down, down_bias, up, up_bias = (
            torch.stack([task.get_parameter(name) for task in self.tasks])[chosen]
            for name in ("down", "down_bias", "up", "up_bias")
        )
        hidden = (x @ down + down_bias[:, None]).relu()  # (B, N, r), each image with factors of its own
        return self.scale * (hidden @ up + up_bias[:, None])
