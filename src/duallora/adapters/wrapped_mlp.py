"""Updates beside the feed-forward half of a block, as AdaptFormer has them.

``y = x + s(mlp(norm(x))) + update(x)``, s being the block's layer scale where it has one. The update reads
what enters the norm and is not scaled by s. It cannot be folded into a weight: it is computed in every pass.
timm's blocks call their norm and their mlp as layers, but hand the mlp nothing that was before the norm. The
wrapper therefore takes norm, mlp and layer scale over, and leaves the block identities in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from duallora.backbones.backbone import Backbone


class BesideMLP(nn.Module):
    """``s(mlp(norm(x))) + update(x)`` in the place of a block's mlp.

    Args:
        block: of a backbone; its ``norm2``, ``mlp`` and layer scale are taken over by :meth:`put`.
        update: maps (B, N, d) to (B, N, d), or to None where it adds nothing.
    """

    def __init__(self, block: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.update = update
        self.norm, self.mlp = block.get_submodule("norm2"), block.get_submodule("mlp")
        # Plain ViTs scale by a module, EVA and BEiT by a parameter that may be None.
        self.ls2: nn.Module | None = getattr(block, "ls2", None)
        self.gamma_2: nn.Parameter | None = getattr(block, "gamma_2", None)

    def put(self, block: nn.Module) -> None:
        """Takes its place in the block it was made of."""
        block.norm2, block.mlp = nn.Identity(), self
        if self.ls2 is not None:
            block.ls2 = nn.Identity()
        if self.gamma_2 is not None:
            block.gamma_2 = nn.Parameter(torch.ones_like(self.gamma_2), requires_grad=False)

    def take_out(self, block: nn.Module) -> None:
        """Gives the block its own layers back."""
        block.norm2, block.mlp = self.norm, self.mlp
        if self.ls2 is not None:
            block.ls2 = self.ls2
        if self.gamma_2 is not None:
            block.gamma_2 = self.gamma_2

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        y: Tensor = self.mlp(self.norm(x))
        if self.ls2 is not None:
            y = self.ls2(y)
        if self.gamma_2 is not None:
            y = self.gamma_2 * y
        update = self.update(x)
        return y if update is None else y + update


def put_beside_mlp(
    backbone: Backbone, layers: Sequence[int], make: Callable[[int], nn.Module]
) -> dict[int, BesideMLP]:
    """Puts an update beside the feed-forward half of each layer.

    Args:
        backbone: whose blocks are wrapped.
        layers: indices of blocks, 0 to ``depth - 1``.
        make: d -> the update of one layer; called in the order of the layers.

    Returns:
        The wrappers by layer, in evaluation mode as the whole backbone.

    Raises:
        ValueError: a layer that the backbone does not have or that is wrapped already; nothing has changed.
    """
    device = next(backbone.parameters()).device
    for layer in layers:
        if not 0 <= layer < backbone.depth:
            raise ValueError(f"layer {layer} of a backbone with {backbone.depth} layers")
        if isinstance(backbone.block(layer).mlp, BesideMLP):
            raise ValueError(f"the mlp of layer {layer} is wrapped already")
    wrappers = {
        layer: BesideMLP(backbone.block(layer), make(backbone.dim).to(device)).eval() for layer in layers
    }
    for layer, wrapper in wrappers.items():
        wrapper.put(backbone.block(layer))
    return wrappers


def unwrap_mlp(backbone: Backbone) -> None:
    """Puts the layers of every wrapped mlp back; a backbone that is not wrapped stays as it is."""
    for layer in range(backbone.depth):
        block = backbone.block(layer)
        if isinstance(block.mlp, BesideMLP):
            block.mlp.take_out(block)
