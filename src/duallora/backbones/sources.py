"""Where backbones come from: the package, timm, Hugging Face, or a local file of any of them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers import HybridEmbed  # type: ignore[attr-defined]
from timm.models import is_model_pretrained
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from duallora.backbones import hf_files, hf_vit
from duallora.backbones.catalog import HUGGING_FACE
from duallora.backbones.info import BackboneInfo
from duallora.backbones.timm_families import check_name, prepared, refusal
from duallora.backbones.weight_file import WeightFile, state_sha256
from duallora.errors import DualLoRAError

EMBEDDED = "embedded"
EMBEDDED_FILE = "vit-micro-conv-64.safetensors"

Size = tuple[int, int]
"""Height and width of images."""

Loaded = tuple[nn.Module, BackboneInfo]


def load_model(
    name: str,
    path: Path | None,
    *,
    pretrained: bool = True,
    size: Size | None = None,
    known: BackboneInfo | None = None,
) -> Loaded:
    """The model that a name stands for, and what is known of it.

    Args:
        name: see :func:`duallora.backbones.backbone.load_backbone`.
        path: local weight file.
        pretrained: False leaves the random initialisation.
        size: height and width of the images, if not the model's own.
        known: what was stored when the backbone was loaded first.

    Raises:
        DualLoRAError: see :func:`duallora.backbones.backbone.load_backbone`.
    """
    if name == EMBEDDED:
        return _load_embedded(path, size)
    if name.startswith(HUGGING_FACE):
        return _load_hugging_face(name, path, pretrained, size, known)
    return _load_timm(name, path, pretrained, size)


def _load_embedded(path: Path | None, size: Size | None) -> Loaded:
    if path is None:
        with resources.as_file(resources.files("duallora") / "weights" / EMBEDDED_FILE) as packaged:
            weights = WeightFile.read(packaged)
    else:
        weights = WeightFile.read(path)
    try:
        mean, std = (_three(weights.metadata[key].split(",")) for key in ("mean", "std"))
        own = int(re.findall(r"img_size=(\d+)", weights.metadata["architecture"])[0])
    except (KeyError, IndexError, ValueError) as error:
        raise DualLoRAError(
            f"{weights.path} has no mean, std and architecture in its metadata and so is no file for the "
            "embedded backbone; name the timm architecture that the file belongs to with --backbone."
        ) from error
    model = _embedded_model(own)
    weights.load_into(model, EMBEDDED)
    file = None if path is None else str(path)
    info = BackboneInfo(EMBEDDED, weights.sha256, mean, std, (3, own, own), "bicubic", 1.0, file)
    return resized(model, info, size)


def _embedded_model(size: int) -> VisionTransformer:
    # The initial weights are replaced at once: they must not cost the caller's random state any draws.
    with torch.random.fork_rng(devices=[]):
        stem = ConvStem(depth=4, channels=(32, 64, 128, 192), stride=(2, 2, 1, 2), act_layer=nn.GELU)
        stem.num_features = 192  # type: ignore[assignment]  # HybridEmbed reads the stem's width there
        side = size // 8
        embed = partial(HybridEmbed, backbone=stem, proj=False, feature_size=(side, side), feature_ratio=8)
        return VisionTransformer(
            img_size=size,
            patch_size=1,
            embed_dim=192,
            depth=6,
            num_heads=3,
            num_classes=0,
            embed_layer=embed,
        )


def _load_hugging_face(
    name: str, path: Path | None, pretrained: bool, size: Size | None, known: BackboneInfo | None
) -> Loaded:
    if known is None or known.config is None:
        if path is not None:
            raise DualLoRAError(
                f"{name} names its own weights; leave --backbone-file out, or give hf:FOLDER."
            )
        config, processor = hf_files.read_config(name), hf_files.read_processor(name)
        try:
            prepares = hf_files.preparation(config, processor)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DualLoRAError(
                f"{hf_files.PROCESSOR} of {name} cannot be understood ({error}); fetch it again."
            ) from error
        info = BackboneInfo(name, "", **prepares, config=config)
    else:
        info, config = known, dict(known.config)
    wanted = info.input_size[1:] if size is None else size
    _check_size(wanted, hf_files.pair(config["patch_size"]), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf_vit.build(config, wanted, name)
    info = replace(info, input_size=(3, *wanted), file=None)
    if not pretrained:
        return model, replace(info, sha256=state_sha256(model))
    local = path is not None or hf_files.folder_of(name) is not None
    weights = WeightFile.read(path or hf_files.fetch(name, hf_files.WEIGHTS) or Path())
    hf_vit.load_into(model, weights, config, name)
    return model, replace(info, sha256=weights.sha256, file=str(weights.path) if local else None)


def _load_timm(name: str, path: Path | None, pretrained: bool, size: Size | None) -> Loaded:
    check_name(name)
    model = _create(name, size, pretrained=pretrained and path is None)
    if path is None:
        sha256 = state_sha256(model)
    else:
        weights = WeightFile.read(path)
        weights.load_into(model, name)
        sha256 = weights.sha256
    return resized(model, _timm_info(model, name, sha256, path), size)


def _create(name: str, size: Size | None, *, pretrained: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # One block shows whether a model can be used, before anything large is built or downloaded.
        try:
            first: Any = timm.create_model(name, pretrained=False, num_classes=0, depth=1)
        except (AssertionError, TypeError, ValueError) as error:
            raise refusal(name, "a timm model whose blocks differ", "each would have to be known") from error
        prepared(first, name)
        if size is not None:
            _check_size(size, first.patch_embed.feat_ratio(as_scalar=False), name)
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


def resized(model: Any, info: BackboneInfo, size: Size | None) -> Loaded:
    """A model for images of another size, its position embeddings resampled; None leaves it as it is.

    The weights stay known by what they were before: a resampling may round otherwise on another machine.

    Args:
        model: of timm; changed in place.
        info: what is known of it.
        size: height and width.

    Raises:
        DualLoRAError: a size that does not fit the patches, or a timm that cannot resample this family.
    """
    if size is None or size == info.input_size[1:]:
        return model, info
    _check_size(size, model.patch_embed.feat_ratio(as_scalar=False), info.name)
    try:
        model.set_input_size(img_size=size)
    except AttributeError as error:  # older timm has no such method for every family and kind of positions
        raise DualLoRAError(
            f"timm {timm.__version__} cannot resample the positions of {info.name}; install a newer timm, or "
            "leave --image-size out."
        ) from error
    return model, replace(info, input_size=(3, *size))


def _check_size(size: Size, patch: Size, name: str) -> None:
    if all(side >= step and side % step == 0 for side, step in zip(size, patch, strict=True)):
        return
    near = [max(step, round(side / step) * step) for side, step in zip(size, patch, strict=True)]
    raise DualLoRAError(
        f"images of {size[0]} x {size[1]} do not fit the {patch[0]} x {patch[1]} patches of {name}; the "
        f"nearest image size is {near[0]}."
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
