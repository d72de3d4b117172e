"""Which timm models can carry adapters, and what their final feature is.

An adapter wraps the fused ``qkv`` layer of an attention module. That is only sound where the attention calls
``qkv`` as a layer: one that reads ``qkv.weight`` bypasses the wrapper without an error. So families are
admitted by name, and all others are refused.
"""

from __future__ import annotations

import difflib

import timm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer  # type: ignore[attr-defined]
from torch import nn

from duallora.errors import DualLoRAError

FAMILIES = ("vision_transformer", "deit", "vision_transformer_hybrid")  # timm's modules with plain ViTs

_BYPASS = "its attention can read qkv.weight directly and so bypass an adapter without an error"
_REFUSED = {"beit": _BYPASS, "eva": f"{_BYPASS}, and its positions are rotary"}
_NOT_PLAIN = "it is not timm's plain VisionTransformer"
_POOLED = {
    "avg": "mean of the {}",
    "avgmax": "half the sum of mean and maximum of the {}",
    "max": "maximum over the {}",
    "map": "attention pooling over the {}",
    "prr": "attention pooling over the {}",
}


def check_name(name: str) -> None:
    """Checks that a name is the full tag of a timm model in a supported family.

    Raises:
        DualLoRAError: unknown (the message has the nearest names), untagged or wrongly tagged (the tags), or
            of another family (the reason).
    """
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        raise DualLoRAError(f"There is no backbone {name!r}; {_hint(name)}.")
    family = str(timm.model_entrypoint(architecture).__module__).rpartition(".")[2]
    if family not in FAMILIES:
        raise _refusal(name, f"of timm's family {family!r}", _REFUSED.get(family, _NOT_PLAIN))
    names = [full for full in timm.list_models(architecture, include_tags=True) if full != architecture]
    if name in names or not (tag or names):  # without any tag: the weights can only come from a file
        return
    problem = f"has no tag {tag!r}" if tag else "must be named by its full tag"
    raise DualLoRAError(f"The backbone {architecture} {problem}; its tags: {', '.join(names) or 'none'}.")


def plain_vit(model: nn.Module, name: str) -> VisionTransformer:
    """The model itself, if every projection of its attention goes through a call of ``qkv``.

    Args:
        model: a timm model.
        name: what messages call it.

    Raises:
        DualLoRAError: any other model, by its name and with the reason.
    """
    kind = type(model)
    plain = (VisionTransformer, VisionTransformerDistilled)
    if not isinstance(model, VisionTransformer) or kind not in plain:  # a subclass may do as it likes
        family = kind.__module__.rpartition(".")[2]
        raise _refusal(name, f"a timm {kind.__name__}", _REFUSED.get(family, _NOT_PLAIN))
    for block in model.blocks.children():
        attention = getattr(block, "attn", None)
        if type(attention) is not Attention:
            found = type(block if attention is None else attention).__name__
            raise _refusal(name, f"a ViT with {found}", "only timm's plain Attention calls qkv as a layer")
        if type(attention.qkv) is not nn.Linear:
            found = type(attention.qkv).__name__
            raise _refusal(name, f"a ViT with {found} as qkv", "only a plain Linear can be wrapped")
        if getattr(attention, "gate", None) is not None:
            raise _refusal(name, "a ViT with gated Attention", "no adapter covers the projection of the gate")
    if not model.global_pool:
        raise _refusal(name, "a ViT without pooling", "it gives no final feature")
    return model


def describe_pooling(model: VisionTransformer) -> str:
    """What the final feature is, in words, and what stands for a missing class token at the gate."""
    if isinstance(model, VisionTransformerDistilled):
        return "mean of the class token and the distillation token"
    if model.global_pool == "token":
        return "class token"
    with_prefix = getattr(model, "pool_include_prefix", False)  # older timm never pools the prefix tokens
    patches_only = model.num_prefix_tokens > 0 and not with_prefix
    words = _POOLED[model.global_pool].format("patch tokens" if patches_only else "tokens")
    if model.cls_token is None:
        return f"{words} (there is no class token; at the gate the mean token stands for it)"
    return words


def _hint(name: str) -> str:
    if name.endswith(".safetensors"):
        return "give a local file with --backbone-file and its timm architecture with --backbone"
    known = [full for family in FAMILIES for full in timm.list_models(module=family, pretrained=True)]
    near = difflib.get_close_matches(name, ["embedded", *known], n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else "give embedded, or the full tag of a timm ViT"


def _refusal(name: str, what: str, reason: str) -> DualLoRAError:
    return DualLoRAError(
        f"The backbone {name} is {what} and cannot carry adapters: {reason}; use a plain ViT of timm, such "
        "as vit_base_patch16_224.augreg_in21k, or one of its DeiT, DINOv2, CLIP or SigLIP models."
    )
