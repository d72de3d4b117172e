"""Hugging Face ViTs as timm's ViT: the same function of the same weights, with q, k and v in one layer.

ViT, DeiT and DINOv2 differ between the two in nothing but names and the layout of the weights, so that every
method, prompts included, finds the attention it knows. ``tests/backbones/test_hf.py`` compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, QuickGELU  # type: ignore[attr-defined]
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.backbones.hf_files import pair
from duallora.backbones.weight_file import WeightFile, differences
from duallora.errors import DualLoRAError

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}

# Of timm and of Hugging Face; several are put one below the other.
_ATTENTION = {
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
}
_VIT = _ATTENTION | {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_DINO = _ATTENTION | {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "ls1": ("layer_scale1",),
    "ls2": ("layer_scale2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_SWIGLU = _DINO | {"mlp.fc1": ("mlp.weights_in",), "mlp.fc2": ("mlp.weights_out",)}
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_LEFT_OUT = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")
_MASK = "embeddings.mask_token"


def build(config: Mapping[str, Any], size: tuple[int, int], name: str) -> VisionTransformer:
    """The model at random weights.

    Args:
        config: what :func:`~duallora.backbones.hf_files.read_config` gave.
        size: height and width of the images, multiples of those of a patch.
        name: what messages call it.

    Raises:
        DualLoRAError: the configuration asks for what timm's ViT does not compute.
    """
    problem = _problem(config)
    if problem is not None:
        raise DualLoRAError(f"The backbone {name} is not supported: {problem}; take another model.")
    kind, dim, swiglu = config["model_type"], config["hidden_size"], config.get("use_swiglu_ffn", False)
    hidden = config["intermediate_size"] if "intermediate_size" in config else int(dim * config["mlp_ratio"])
    registers = config.get("num_register_tokens", 0)
    settings: dict[str, Any] = {"act_layer": _ACTIVATIONS[config["hidden_act"]]}
    if swiglu:  # a product of two parts, each of two thirds of the width
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        settings = {"act_layer": nn.SiLU, "mlp_layer": partial(GluMlp, gate_last=False)}
    model = VisionTransformerDistilled if kind == "deit" else VisionTransformer
    return model(
        img_size=size,
        patch_size=config["patch_size"],
        embed_dim=dim,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=(hidden + 0.5) / dim,  # timm truncates the product
        qkv_bias=config["qkv_bias"],
        init_values=1.0 if kind.startswith("dinov2") else None,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        num_classes=0,
        **settings,
    )


def load_into(model: VisionTransformer, file: WeightFile, config: Mapping[str, Any], name: str) -> None:
    """Puts the weights of ``model.safetensors`` into what :func:`build` gave; the rest is strict.

    Raises:
        DualLoRAError: naming the first tensors that are missing, unknown or of another shape.
    """
    kind = config["model_type"]
    tensors = {re.sub(rf"^{kind}\.", "", key): tensor for key, tensor in file.tensors.items()}
    tensors = {k: x for k, x in tensors.items() if k != _MASK and not k.startswith(_LEFT_OUT)}
    sources = {key: _sources(key, config) for key in model.state_dict()}
    used = {each for group in sources.values() for each in group}
    problems = [f"{key} is missing" for key in sorted(used - tensors.keys())[:3]]
    problems += [f"{key} is unknown" for key in sorted(tensors.keys() - used)[:3]]
    given: dict[str, Tensor] = {}
    if not problems:
        given = {key: torch.cat([tensors[each].float() for each in group]) for key, group in sources.items()}
        _set_places(model, given, config)
        different = differences(given, model.state_dict())
        problems = [different] if different else []
    if problems:
        raise DualLoRAError(
            f"{file.path} does not hold the weights of {name}: {', '.join(problems[:3])}; fetch it again, "
            "together with its config.json."
        )
    model.load_state_dict(given)


def _sources(key: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors of the file that make up one of timm's."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", key)
    if found is None:
        return (_OUTSIDE[key],)
    layer, module, kind = found.groups()
    names = _SWIGLU if config.get("use_swiglu_ffn") else _DINO if "mlp_ratio" in config else _VIT
    last = "lambda1" if kind == "gamma" else kind
    return tuple(f"encoder.layer.{layer}.{each}.{last}" for each in names[module])


def _set_places(model: VisionTransformer, given: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Position embeddings at the model's size, resampled as transformers does it."""
    special = 2 if config["model_type"] == "deit" else 1
    first, patches = given["pos_embed"][:, :special], given["pos_embed"][:, special:]
    side, grid = round(patches.shape[1] ** 0.5), tuple(model.patch_embed.grid_size)
    if side * side == patches.shape[1] and grid != (side, side):
        image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        smooth = config["model_type"] == "dinov2_with_registers"
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=smooth)
        patches = image.flatten(2).transpose(1, 2)
    if model.no_embed_class:  # timm keeps no place of the class token then: it is a part of the token
        given["cls_token"], first = given["cls_token"] + first, first[:, :0]
    given["pos_embed"] = torch.cat([first, patches], 1)


def _problem(config: Mapping[str, Any]) -> str | None:
    """What timm's ViT does not compute."""
    counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in counts:
        if key in config and (not isinstance(config[key], int) or config[key] < 1):
            return f"{key} in its config.json is {config[key]!r}, not a whole number"
    for key in ("layer_norm_eps", "mlp_ratio"):
        if key in config and not isinstance(config[key], (int, float)):
            return f"{key} in its config.json is {config[key]!r}, not a number"
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if config["hidden_act"] not in _ACTIVATIONS:
        return f"its activation {config['hidden_act']!r} is unknown"
    if config["num_channels"] != 3:
        return f"its images have {config['num_channels']} channels, not 3"
    if dim % heads or config["head_dim"] not in (None, dim // heads):
        return "the width of its heads is not the width of the tokens over their number"
    sizes = [pair(config[key]) for key in ("image_size", "patch_size")]
    if any(height != width for height, width in sizes):
        return "its images or patches are not square"
    return None
