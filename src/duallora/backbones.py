"""Frozen backbones: the embedded ViT, timm ViTs by their full tag, and local weight files of either."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data.config import resolve_model_data_config
from timm.layers import HybridEmbed  # type: ignore[attr-defined]
from timm.models import is_model_pretrained
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from duallora.errors import DualLoRAError
from duallora.families import check_name, describe_pooling, plain_vit

EMBEDDED = "embedded"
EMBEDDED_FILE = "vit-micro-conv-64.safetensors"


@dataclass(frozen=True)
class BackboneInfo:
    """Which weights these are, and how an image is prepared for them.

    Attributes:
        name: ``"embedded"``, or a timm name with its tag.
        sha256: of the weight file (embedded and local); :func:`state_sha256` for downloaded weights.
        mean: per RGB channel, of images in [0, 1].
        std: per RGB channel.
        input_size: (channels, height, width).
        interpolation: as timm names it (``"bicubic"``, ``"bilinear"``).
        crop_pct: share of the resized image that the centre crop keeps.
        crop_mode: ``"center"`` keeps the aspect ratio before the crop; ``"squash"`` does not.
        file: path of a local weight file, or None.
    """

    name: str
    sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    file: str | None = None
    crop_mode: str = "center"

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        fields = asdict(self)
        return fields | {key: list(fields[key]) for key in ("mean", "std", "input_size")}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave, also after a way through JSON."""
        return cls(**(dict(fields) | {key: tuple(fields[key]) for key in ("mean", "std", "input_size")}))


class Backbone(nn.Module):
    """A frozen ViT without its classifier: fp32, no gradients, evaluation mode whatever is asked of it.

    Args:
        model: timm ``VisionTransformer`` (or DeiT's distilled one); taken over, and its classifier removed.
        info: where the weights come from and how images are prepared.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        feature_dim: width of the final feature.
        early: the layer whose input class rows read beside the final feature; adapters begin there.
        row_dim: width of everything that class rows read, the final feature first.
        has_class_token: whether token 0 is a class token.
        num_prefix_tokens: tokens before the patch tokens (class, distillation, registers).
        pooling: in words, what the final feature is.
        plain_qkv: the projections that an adapter has replaced, by layer.
        taken: whether a method has it already; two on one backbone would see each other's adapters.

    Raises:
        DualLoRAError: the model is of a family whose attention cannot be wrapped.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo) -> None:
        super().__init__()
        self.info = info
        self.model = plain_vit(model, info.name)
        self.model.reset_classifier(0)
        self.model.float().requires_grad_(False)
        self.dim: int = self.model.embed_dim
        self.depth = len(self.model.blocks)
        self.feature_dim: int = self.model.num_features
        self.has_class_token = self.model.cls_token is not None
        self.num_prefix_tokens: int = self.model.num_prefix_tokens
        self.pooling = describe_pooling(self.model)
        self.early = max(1, self.depth // 3)
        self.row_dim = self._row_dim()
        self.plain_qkv: dict[int, nn.Linear] = {}
        self.taken = False
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, row_dim): the final feature, and beside it what else class rows read.

        The first ``feature_dim`` columns are what timm's classifier gets. Behind them: the mean patch token
        after the last block, then class token and mean patch token as they enter the attention of layer
        ``early``, below the adapters. One pass gives all of it.
        """
        found: Any = self.model.forward_intermediates(
            images, indices=[min(self.early, self.depth) - 1], return_prefix_tokens=True, output_fmt="NLC"
        )
        tokens, between = found
        parts = [self.model.forward_head(tokens, pre_logits=True)]
        if not self._pools_patches:
            parts.append(self._mean_patch(tokens))
        if self.early < self.depth:
            x = self.model.get_submodule(f"blocks.{self.early}.norm1")(_joined(between[0]))
            parts += [x[:, 0]] if self.has_class_token else []
            parts.append(self._mean_patch(x))
        return torch.cat([part.float() for part in parts], 1)

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
        found: Any = self.model.forward_intermediates(
            images,
            indices=[layer - 1],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        block = self.model.get_submodule(f"blocks.{layer}")
        block.get_submodule("attn.qkv")(block.get_submodule("norm1")(_joined(found[0])))

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
    name: str = EMBEDDED, file: str | Path | None = None, *, pretrained: bool = True
) -> Backbone:
    """Loads a frozen backbone.

    Args:
        name: ``"embedded"``, or the full tag of a timm ViT such as ``"vit_base_patch16_224.augreg_in21k"``.
        file: local ``.safetensors`` file in timm's keys for that architecture, its classifier optional.
        pretrained: False leaves a timm architecture at a random initialisation, always the same.

    Raises:
        DualLoRAError: a name that is unknown, untagged or of an unsupported family, weights that cannot be
            downloaded, a file that cannot be read or does not fit.
    """
    path = None if file is None else Path(file)
    if name == EMBEDDED:
        return _load_embedded(path)
    check_name(name)
    model = _create(name, pretrained=pretrained and path is None)
    if path is None:
        sha256 = state_sha256(model)
    else:
        weights = _WeightFile.read(path)
        weights.load_into(model, name)
        sha256 = weights.sha256
    return Backbone(model, _timm_info(model, name, sha256, path))


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a model's parameters and buffers, in the order of the names.

    The classifier is left out, so that removing it changes nothing.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not _of_classifier(key):
            digest.update(key.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_embedded(path: Path | None) -> Backbone:
    if path is None:
        with resources.as_file(resources.files("duallora") / "weights" / EMBEDDED_FILE) as packaged:
            weights = _WeightFile.read(packaged)
    else:
        weights = _WeightFile.read(path)
    try:
        mean, std = (_three(weights.metadata[key].split(",")) for key in ("mean", "std"))
        size = int(re.findall(r"img_size=(\d+)", weights.metadata["architecture"])[0])
    except (KeyError, IndexError, ValueError) as error:
        raise DualLoRAError(
            f"{weights.path} has no mean, std and architecture in its metadata and so is no file for the "
            "embedded backbone; name the timm architecture that the file belongs to with --backbone."
        ) from error
    model = _embedded_model(size)
    weights.load_into(model, EMBEDDED)
    file = None if path is None else str(path)
    info = BackboneInfo(EMBEDDED, weights.sha256, mean, std, (3, size, size), "bicubic", 1.0, file)
    return Backbone(model, info)


def _embedded_model(size: int) -> VisionTransformer:
    # The initial weights are replaced at once: they must not cost the caller's random state any draws.
    with torch.random.fork_rng(devices=[]):
        stem = ConvStem(depth=4, channels=(32, 64, 128, 192), stride=(2, 2, 1, 2), act_layer=nn.GELU)
        stem.num_features = 192  # type: ignore[assignment]  # HybridEmbed reads the stem's width there
        embed = partial(HybridEmbed, backbone=stem, proj=False, feature_size=(size // 8, size // 8))
        return VisionTransformer(
            img_size=size,
            patch_size=1,
            embed_dim=192,
            depth=6,
            num_heads=3,
            num_classes=0,
            embed_layer=embed,
        )


def _create(name: str, *, pretrained: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # One block shows whether a model can be wrapped, before anything large is built or downloaded.
        plain_vit(timm.create_model(name, pretrained=False, num_classes=0, depth=1), name)
        if not pretrained:
            return timm.create_model(name, pretrained=False)
        if not is_model_pretrained(name):
            raise DualLoRAError(f"timm has no weights for {name}; give a file with --backbone-file.")
        try:
            return timm.create_model(name, pretrained=True)  # with the classifier: timm is strict only then
        except Exception as error:  # hub, cache and timm raise errors of many kinds, and others by version
            raise DualLoRAError(
                f"The weights of {name} could not be downloaded ({type(error).__name__}); on a machine with "
                f"network access fetch https://huggingface.co/timm/{name}/resolve/main/model.safetensors and "
                "give the file with --backbone-file."
            ) from error


def _timm_info(model: nn.Module, name: str, sha256: str, file: Path | None) -> BackboneInfo:
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    channels, height, width = data["input_size"]
    return BackboneInfo(
        name=name,
        sha256=sha256,
        mean=_three(data["mean"]),
        std=_three(data["std"]),
        input_size=(int(channels), int(height), int(width)),
        interpolation=str(data["interpolation"]),
        crop_pct=float(data["crop_pct"]),
        file=None if file is None else str(file),
        crop_mode=str(data.get("crop_mode", "center")),
    )


@dataclass(frozen=True)
class _WeightFile:
    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _WeightFile:
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            with safe_open(path, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not iterable)
                return cls(path, digest, tensors, opened.metadata() or {})
        except OSError as error:
            raise DualLoRAError(f"The backbone file {path} cannot be read ({error.strerror}).") from error
        except SafetensorError as error:
            raise DualLoRAError(
                f"{path} is not a complete .safetensors file ({error}); fetch it again, or convert it."
            ) from error

    def load_into(self, model: nn.Module, name: str) -> None:
        """Strict but for the classifier: all other tensors in their shapes, and nothing else."""
        given = {key: tensor for key, tensor in self.tensors.items() if not _of_classifier(key)}
        wanted = {key: tensor for key, tensor in model.state_dict().items() if not _of_classifier(key)}
        problems = [f"{key} is missing" for key in wanted if key not in given]
        problems += [f"{key} is unknown" for key in given if key not in wanted]
        for key in given.keys() & wanted.keys():
            if given[key].shape != wanted[key].shape:
                problems.append(f"{key} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise DualLoRAError(
                f"{self.path} does not hold the weights of {name} in timm's keys: "
                f"{', '.join(sorted(problems)[:3])}{more}; give the architecture of the file with --backbone."
            )
        model.load_state_dict(given, strict=False)  # checked above: only the classifier may be left out


def _of_classifier(key: str) -> bool:
    return key.startswith(("head.", "head_dist."))


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
