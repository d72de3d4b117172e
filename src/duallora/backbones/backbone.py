"""Frozen backbones: the embedded ViT, timm's by their full tag, Hugging Face's, and local weight files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from duallora.backbones.compiling import any_batch, compiler_errors, tell_uncompiled
from duallora.backbones.info import BackboneInfo, Normalization
from duallora.backbones.sources import EMBEDDED, EMBEDDED_FILE, load_model
from duallora.backbones.timm_families import describe_pooling, positions, prepared
from duallora.backbones.weight_file import state_sha256
from duallora.errors import DualLoRAError
from duallora.storage.soundness import LARGEST_SIDE

__all__ = ["EMBEDDED", "EMBEDDED_FILE", "Backbone", "BackboneInfo", "load_backbone", "state_sha256"]


class Backbone(nn.Module):
    """A frozen ViT without its classifier: fp32, no gradients, evaluation mode whatever is asked of it.

    Args:
        model: of timm, of a supported family; taken over: its classifier is removed, and its attentions call
            one fused ``qkv`` layer each (see ``duallora.backbones.fused_qkv``).
        info: where the weights come from and how images are prepared.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        feature_dim: width of the final feature.
        early: the layer whose input class rows read beside the final feature; adapters begin there.
        row_dim: width of everything that class rows read, the final feature first.
        has_class_token: whether token 0 is a class token.
        num_prefix_tokens: tokens before the patch tokens (class, distillation, registers).
        grid: rows and columns of the patch tokens.
        pooling: in words, what the final feature is.
        positions: ``"absolute"``, or how every attention places the tokens (``"rotary"``, ``"relative"``).
        plain_qkv: the projections that an adapter has replaced, by layer.
        taken: whether a method has it already; two on one backbone would see each other's adapters.

    Raises:
        DualLoRAError: the model is of a family whose attention cannot be wrapped.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo) -> None:
        super().__init__()
        self.info = info
        self.model = prepared(model, info.name)
        self.model.reset_classifier(0)
        self.model.float().requires_grad_(False)
        self.dim: int = self.model.embed_dim
        self.depth = len(self.model.blocks)
        self.feature_dim: int = self.model.num_features
        self.has_class_token = self.model.cls_token is not None
        self.num_prefix_tokens: int = self.model.num_prefix_tokens
        self.grid: tuple[int, int] = tuple(self.model.patch_embed.grid_size)
        self.pooling = describe_pooling(self.model)
        self.positions = positions(self.model)
        self.early = max(1, self.depth // 3)
        self.row_dim = self._row_dim()
        self.plain_qkv: dict[int, nn.Linear] = {}
        self.taken = False
        self.eval()

    def __call__(self, images: Tensor) -> Any:
        """As :meth:`forward`; compiled, where :meth:`compile` was called and a compiler can do it."""
        if not self.compiled or torch.compiler.is_compiling():
            return super().__call__(images)
        any_batch(images)
        try:
            return super().__call__(images)
        except compiler_errors() as error:
            self.leave_uncompiled(error)
            return super().__call__(images)

    @property
    def compiled(self) -> bool:
        """Whether passes are compiled."""
        return self._compiled_call_impl is not None

    def leave_uncompiled(self, error: Exception) -> None:
        """Goes on without the compiler that has raised an error, and says so."""
        self._compiled_call_impl = None
        tell_uncompiled(error)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, row_dim): the final feature, and beside it what else class rows read.

        The first ``feature_dim`` columns are what timm's classifier gets. Behind them: the mean patch token
        after the last block, then class token and mean patch token as they enter the attention of layer
        ``early``, below the adapters. One pass gives all of it.
        """
        tokens, between = self._through(images, min(self.early, self.depth) - 1)
        parts = [self.model.forward_head(tokens, pre_logits=True)]
        if not self._pools_patches:
            parts.append(self._mean_patch(tokens))
        if self.early < self.depth:
            x = self.model.get_submodule(f"blocks.{self.early}.norm1")(_joined(between[0]))
            parts += [x[:, 0]] if self.has_class_token else []
            parts.append(self._mean_patch(x))
        return torch.cat([part.float() for part in parts], 1)

    @property
    def patch_columns(self) -> slice | None:
        """Where :meth:`forward` gives the mean patch token; None where the final feature is that already."""
        return None if self._pools_patches else slice(self.feature_dim, self.feature_dim + self.dim)

    def _mean_patch(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, d)."""
        return tokens[:, self.num_prefix_tokens :].float().mean(1)

    @property
    def _pools_patches(self) -> bool:
        """Whether the final feature is the mean patch token itself."""
        return bool(self.model.global_pool == "avg")

    def _row_dim(self) -> int:
        below = 0 if self.early >= self.depth else 1 + self.has_class_token
        return self.feature_dim + self.dim * (below + (not self._pools_patches))

    def project(self, images: Tensor, layer: int) -> None:
        """Runs up to the qkv projection of a block, for passes that only look at what enters projections."""
        if layer == 0:
            self(images)
            return
        found = self._through(images, layer - 1, stop_early=True, intermediates_only=True)
        block = self.model.get_submodule(f"blocks.{layer}")
        block.get_submodule("attn.qkv")(block.get_submodule("norm1")(_joined(found[0])))

    def early_exit(self, images: Tensor, layer: int) -> Tensor:
        """(B, 3, H, W) -> (B, feature_dim): the final feature as if the model ended after a block."""
        found = self._through(images, layer, stop_early=True, intermediates_only=True, norm=True)
        feature: Tensor = self.model.forward_head(_joined(found[0]), pre_logits=True)
        return feature

    def _through(self, images: Tensor, layer: int, **settings: bool) -> Any:
        """A pass that gives the tokens after a block beside its result, or alone."""
        prefix = self.num_prefix_tokens > 0  # EVA cannot give what is not there
        model: Any = self.model
        return model.forward_intermediates(
            images, indices=[layer], return_prefix_tokens=prefix, output_fmt="NLC", **settings
        )

    def block(self, layer: int) -> Any:
        """A block; its ``mlp`` may be wrapped."""
        return self.model.get_submodule(f"blocks.{layer}")

    def attention(self, layer: int) -> nn.Module:
        """Attention module of a block; its ``qkv`` may be wrapped."""
        return self.model.get_submodule(f"blocks.{layer}.attn")

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: batch norm in a stem must not follow the images of a task."""
        return super().train(False)


def _joined(tokens: Any) -> Tensor:
    """Tokens (B, N, d) from what timm gives: patch tokens, or a pair of patch and prefix tokens."""
    return torch.cat([tokens[1], tokens[0]], 1) if isinstance(tokens, tuple) else tokens


def load_backbone(
    name: str | BackboneInfo = EMBEDDED,
    file: str | Path | None = None,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    normalization: Normalization = "backbone",
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Backbone:
    """Loads a frozen backbone.

    Args:
        name: ``"embedded"``, the full tag of a timm ViT such as ``"vit_base_patch16_224.augreg_in21k"``, or a
            Hugging Face ViT as ``"hf:OWNER/NAME"`` or ``"hf:FOLDER"``. The info of a backbone gives that one
            again, its size and preparation included; only ``file`` counts beside it.
        file: local ``.safetensors`` file in timm's keys for that architecture, its classifier optional.
        pretrained: False leaves an architecture at a random initialisation, always the same.
        image_size: height and width of the images; the position embeddings are resampled.
        normalization: of the images: the backbone's own, ImageNet's mean and std, or none.
        crop_pct: share of the resized image that the centre crop keeps; None is the backbone's own.
        interpolation: of the resize; None is the backbone's own.

    Raises:
        DualLoRAError: a name that is unknown, untagged or of an unsupported family, weights that cannot be
            downloaded, a file that cannot be read or does not fit, a size that does not fit the patches or is
            above 1,536.
    """
    if isinstance(name, BackboneInfo):
        file = name.file if file is None else file
        path = None if file is None else Path(file)
        model, found = load_model(name.name, path, size=name.input_size[1:], known=name)
        return Backbone(model, replace(name, sha256=found.sha256, file=found.file))
    path = None if file is None else Path(file)
    if image_size is not None and image_size > LARGEST_SIDE:  # a model of such could not be loaded again
        raise DualLoRAError(f"the image size must be at most {LARGEST_SIDE} pixels, not {image_size}.")
    size = None if image_size is None else (image_size, image_size)
    model, info = load_model(name, path, pretrained=pretrained, size=size)
    return Backbone(model, info.prepared(normalization, crop_pct, interpolation))
