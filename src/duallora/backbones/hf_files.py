"""Hugging Face ViTs by name or folder: their files, their configuration and how their images are prepared.

What is read is what ``save_pretrained`` of any version of transformers writes and the hub holds; transformers
itself is not needed. :mod:`duallora.backbones.hf_vit` computes with the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from duallora.backbones.catalog import HUGGING_FACE
from duallora.errors import DualLoRAError
from duallora.storage.regular import read_regular

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"

# transformers writes every field, but files of old versions lack those that came later.
_COMMON: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
    "head_dim": None,
}
_VIT = _COMMON | {"patch_size": 16, "layer_norm_eps": 1e-12, "intermediate_size": 3072}
_DINO = _COMMON | {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO | {"patch_size": 16, "num_register_tokens": 4},
}
"""Fields of ``config.json`` that decide about the model, by ``model_type``, as transformers sets them."""

_ELSEWHERE = {
    "beit": "beit_base_patch16_224.in22k_ft_in22k",
    "clip": "vit_base_patch16_clip_224.openai",
    "clip_vision_model": "vit_base_patch16_clip_224.openai",
    "dinov3_vit": "vit_small_patch16_dinov3.lvd1689m",
    "siglip": "vit_base_patch16_siglip_224.webli",
    "siglip_vision_model": "vit_base_patch16_siglip_224.webli",
    "vit_mae": "vit_base_patch16_224.mae",
}
# How images are prepared where no file says it: for ViT, and for the others.
_UNKNOWN: dict[bool, dict[str, Any]] = {
    True: {"resample": 2},
    False: {"resample": 3, "image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD},
}
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow


def folder_of(name: str) -> Path | None:
    """The local folder that ``hf:FOLDER`` names; None for a name on the hub.

    Raises:
        DualLoRAError: it is neither.
    """
    rest = name.removeprefix(HUGGING_FACE)
    if rest and Path(rest).is_dir():
        return Path(rest)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", rest):
        return None
    raise DualLoRAError(
        f"There is no folder {rest!r}, and it is no name on Hugging Face; give hf:FOLDER, or hf:OWNER/NAME "
        "such as hf:google/vit-base-patch16-224-in21k."
    )


def fetch(name: str, file: str) -> Path | None:
    """One of a model's three files: in its folder, or downloaded into the cache of huggingface_hub.

    Returns:
        Its path; None if there is no ``preprocessor_config.json``.

    Raises:
        DualLoRAError: the file is not there, or cannot be downloaded.
    """
    folder = folder_of(name)
    if folder is None:
        return _download(name.removeprefix(HUGGING_FACE), file)
    if (folder / file).is_file():
        return folder / file
    if file == PROCESSOR:
        return None
    raise DualLoRAError(
        f"{folder} has no {file}; save the model there with save_pretrained of transformers, in one file."
    )


def _download(repository: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub, its cache and the network raise errors of many kinds
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            raise DualLoRAError(
                f"{file} of {repository} could not be downloaded ({type(error).__name__}); on a machine with "
                f"network access fetch {CONFIG}, {PROCESSOR} and {WEIGHTS} from "
                f"https://huggingface.co/{repository}/tree/main into a folder and give --backbone hf:FOLDER."
            ) from error
        if file == PROCESSOR:
            return None
        raise DualLoRAError(
            f"{repository} on Hugging Face has no {file}; load it with transformers, write it to a folder "
            "with save_pretrained and give --backbone hf:FOLDER."
        ) from error


def read_config(name: str) -> dict[str, Any]:
    """The fields of a model's ``config.json`` that decide about it, its ``model_type`` among them.

    Raises:
        DualLoRAError: it cannot be read, or is of a model that is not supported.
    """
    fields = _json(fetch(name, CONFIG))
    kind = fields.get("model_type")
    if kind not in DEFAULTS:
        instead = f", or {_ELSEWHERE[kind]} of timm" if kind in _ELSEWHERE else ""
        raise DualLoRAError(
            f"The backbone {name} is of type {kind!r} and cannot carry adapters: the types that can are "
            f"{', '.join(DEFAULTS)}; take one of those{instead}."
        )
    config = {"model_type": kind} | {key: fields.get(key, value) for key, value in DEFAULTS[kind].items()}
    for key in ("image_size", "patch_size"):
        try:
            sound = min(pair(config[key])) > 0
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise DualLoRAError(
                f"{CONFIG} of {name} says {key} {config[key]!r}, which is none; fetch it again."
            )
    return config


def read_processor(name: str) -> dict[str, Any] | None:
    """The fields of ``preprocessor_config.json``; None if there is no such file."""
    path = fetch(name, PROCESSOR)
    return None if path is None else _json(path)


def preparation(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """How images are prepared, as fields of :class:`~duallora.backbones.backbone.BackboneInfo`.

    Without a processor they are resized to the model's own size and normalised as its kind was trained.
    """
    own, patch = pair(config["image_size"]), pair(config["patch_size"])
    if processor is None:
        processor = _UNKNOWN[config["model_type"] == "vit"]
    size, crop_pct, crop_mode = _crop(processor, own)
    if any(side % step for side, step in zip(size, patch, strict=True)):
        size = own
    mean, std = _normalization(processor)
    interpolation = _RESAMPLING[int(processor.get("resample", 2))]
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "input_size": (3, *size),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }


def _normalization(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and std of images in [0, 1], to which transformers may scale bytes otherwise, or not at all."""
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    mean, std = [0.0] * 3, [1.0] * 3
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean") or [0.5] * 3, processor.get("image_std") or [0.5] * 3
    return [value / scale for value in mean], [value / scale for value in std]


def _crop(processor: Mapping[str, Any], own: tuple[int, int]) -> tuple[tuple[int, int], float, str]:
    """Size of the input, the share that a centre crop keeps, and whether the ratio of the sides is kept."""
    resized = processor.get("size") or list(own)
    if not isinstance(resized, Mapping):
        resized = {"height": pair(resized)[0], "width": pair(resized)[1]}
    crops = processor.get("do_center_crop", False) and processor.get("crop_size") is not None
    if "shortest_edge" in resized:
        edge, mode = int(resized["shortest_edge"]), "center"
        size = _square(processor["crop_size"]) if crops else (edge, edge)
    else:
        edge, mode = int(resized["height"]), "squash"
        size = _square(processor["crop_size"]) if crops else (edge, int(resized["width"]))
    share = min(1.0, size[0] / edge)
    # floor(size / share) is what the image is resized to: a rounding must not cost a pixel.
    return size, share if math.floor(size[0] / share) >= edge else math.nextafter(share, 0.0), mode


def _square(crop: Any) -> tuple[int, int]:
    return (int(crop["height"]), int(crop["width"])) if isinstance(crop, Mapping) else pair(crop)


def pair(size: Any) -> tuple[int, int]:
    """Height and width from one number for both, or from two."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _json(path: Path | None) -> dict[str, Any]:
    try:
        fields = json.loads(read_regular(path)) if path is not None else None
    except (OSError, ValueError, RecursionError) as error:
        raise DualLoRAError(f"{path} cannot be read or is not JSON; fetch it again.") from error
    if not isinstance(fields, dict):
        raise DualLoRAError(f"{path} is no JSON object; fetch it again.")
    return fields
