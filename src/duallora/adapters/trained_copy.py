"""A copy of all of a backbone's parameters that is trained in the place of its own."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from duallora.backbones.backbone import Backbone


class TrainedCopy(nn.ParameterDict):
    """A parameter for each of the backbone's, which it starts as; dots in their names are slashes.

    Args:
        backbone: stays as it is; it has no adapters.
    """

    def __init__(self, backbone: Backbone) -> None:
        # A module's parameters cannot have dots in their names.
        super().__init__({n.replace(".", "/"): p.detach().clone() for n, p in backbone.named_parameters()})
        self._swapping = threading.Lock()

    def originals(self, backbone: Backbone) -> list[Tensor]:
        """The backbone's own parameters in the order of these, which torch has sorted by name."""
        own = dict(backbone.named_parameters())
        return [own[name.replace("/", ".")] for name in self]

    def features(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Features (n, row_dim) of the backbone with these parameters in the place of its own.

        Args:
            backbone: the one that was copied.
            images: (n, 3, H, W).
        """
        copies = {name.replace("/", "."): p for name, p in self.items()}
        # While the call runs, the parameters stand in the one backbone that all threads share.
        with self._swapping:
            features: Tensor = torch.func.functional_call(backbone, copies, (images,))
        return features
