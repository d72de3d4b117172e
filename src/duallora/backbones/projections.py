"""What q, k and v are called in the model that a backbone was made from, for those who adapt that model."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import timm
import torch

from duallora.backbones.catalog import HUGGING_FACE
from duallora.backbones.info import BackboneInfo
from duallora.backbones.sources import EMBEDDED
from duallora.errors import DualLoRAError

_APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_BIASES = ("q_bias", "k_bias", "v_bias")


def projection_names(info: BackboneInfo, layer: int) -> tuple[str, ...]:
    """Names of the linear layers that compute q, k and v of a block: one fused layer, or three.

    Args:
        info: of the backbone.
        layer: index of the block.

    Raises:
        DualLoRAError: a wrapper around those layers would be bypassed, or the model's library is not
            installed.
    """
    if info.name.startswith(HUGGING_FACE):
        return _of_transformers(info, layer)
    if info.name == EMBEDDED:
        return (f"blocks.{layer}.attn.qkv",)
    with torch.random.fork_rng(devices=[]):
        first: Any = timm.create_model(info.name, pretrained=False, num_classes=0, depth=1)
    attention = first.blocks[0].attn
    if isinstance(getattr(attention, "q_proj", None), torch.nn.Module):
        return tuple(f"blocks.{layer}.attn.{name}" for name in _APART[0])
    if any(getattr(attention, name, None) is not None for name in _BIASES):
        raise DualLoRAError(
            f"the attention of {info.name} in timm multiplies by its weights without calling their layer, so "
            "an adapter around that layer would do nothing; export as torch-export or onnx."
        )
    return (f"blocks.{layer}.attn.qkv",)


def made_from(info: BackboneInfo) -> str:
    """In words, which model and library the names of :func:`projection_names` are of."""
    if info.name.startswith(HUGGING_FACE):
        return f"AutoModel of transformers {version('transformers')}"
    if info.name == EMBEDDED:
        return 'duallora.load_backbone("embedded").model'
    return f'timm.create_model("{info.name}", pretrained=True, num_classes=0) of timm {timm.__version__}'


def _of_transformers(info: BackboneInfo, layer: int) -> tuple[str, ...]:
    """The names differ between versions of transformers; the one that is installed is asked."""
    if find_spec("transformers") is None:
        raise DualLoRAError(
            "the layers of a Hugging Face model have other names in other versions of transformers; install "
            "the version that will be used: pip install transformers."
        )
    from transformers import AutoConfig, AutoModel

    fields = dict(info.config or {})
    known = {key: value for key, value in fields.items() if value is not None and key != "model_type"}
    with torch.device("meta"):
        model: Any = AutoModel.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(fields["model_type"], **known)
        )
    layers = [name for name, _ in model.named_modules() if f".{layer}." in f".{name}."]
    for names in _APART:
        found = tuple(name for last in names for name in layers if name.endswith(f".{last}"))
        if len(found) == len(names):
            return found
    raise DualLoRAError(
        f"{info.name} has no layers for q, k and v in transformers {version('transformers')}."
    )
