"""Which models of timm can carry adapters, what is made of them for that, and what their final feature is.

An adapter wraps the fused ``qkv`` layer of an attention. That is only sound where every projection goes
through a call of that layer, so families are admitted by name, their attentions are laid out and probed (see
:mod:`duallora.backbones.fused_qkv`), and all others are refused.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import timm
from timm.layers import AttentionRope  # type: ignore[attr-defined]
from timm.models import beit, eva, vision_transformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from duallora.backbones.fused_qkv import calls_qkv, fuse
from duallora.errors import DualLoRAError

MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "eva", "beit")  # of timm

Vit = VisionTransformer | Eva | Beit
Positions = Literal["absolute", "rotary", "relative"]


@dataclass(frozen=True)
class _Kind:
    """Exact types, since a subclass may do as it likes."""

    models: tuple[type[nn.Module], ...]
    block: type[nn.Module]
    attentions: tuple[type[nn.Module], ...]


_KINDS = (
    _Kind(
        (VisionTransformer, VisionTransformerDistilled),
        vision_transformer.Block,
        (vision_transformer.Attention,),  # type: ignore[attr-defined]
    ),
    _Kind((Eva,), eva.EvaBlock, (eva.EvaAttention, AttentionRope)),
    _Kind((Beit,), beit.Block, (beit.Attention,)),
)

_NOT_PLAIN = "it is none of the plain ViTs that are known here"
_POOLED = {
    "token": "class token",
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
    module = str(timm.model_entrypoint(architecture).__module__).rpartition(".")[2]
    if module not in MODULES:
        raise refusal(name, f"of timm's family {module!r}", _NOT_PLAIN)
    names = [full for full in timm.list_models(architecture, include_tags=True) if full != architecture]
    if name in names or not (tag or names):  # without any tag: the weights can only come from a file
        return
    problem = f"has no tag {tag!r}" if tag else "must be named by its full tag"
    raise DualLoRAError(f"The backbone {architecture} {problem}; its tags: {', '.join(names) or 'none'}.")


def prepared(model: nn.Module, name: str) -> Vit:
    """The model itself, once every projection of its attention goes through a call of ``qkv``.

    Args:
        model: a timm model; its projections are laid out anew where they are not one fused layer.
        name: what messages call it.

    Raises:
        DualLoRAError: any other model, by its name and with the reason.
    """
    kind = next((kind for kind in _KINDS if type(model) in kind.models), None)
    if kind is None or not isinstance(model, Vit):
        raise refusal(name, f"a timm {type(model).__name__}", _NOT_PLAIN)
    for block in model.blocks.children():
        attention: Any = getattr(block, "attn", None)
        if type(attention) not in kind.attentions:
            found = type(block if attention is None else attention).__name__
            raise refusal(name, f"a ViT with {found}", "it is not known to call qkv as a layer")
        if type(block) is not kind.block:
            reason = "its attention does not read what its first norm gives"
            raise refusal(name, f"a ViT with {type(block).__name__}", reason)
        problem = fuse(attention)
        if problem is None and not calls_qkv(attention):
            problem = "it does not call qkv as a layer and would bypass an adapter without an error"
        if problem is not None:
            raise refusal(name, f"a ViT with {type(attention).__name__}", problem)
    if not model.global_pool:
        raise refusal(name, "a ViT without pooling", "it gives no final feature")
    return model


def positions(model: Vit) -> Positions:
    """Where a token's place enters: at the input, or in every attention, which then knows no other tokens."""
    if getattr(model, "rope", None) is not None:
        return "rotary"
    tables = (m for m in model.modules() if getattr(m, "relative_position_bias_table", None) is not None)
    return "absolute" if next(tables, None) is None else "relative"


def describe_pooling(model: Vit) -> str:
    """What the final feature is, in words, and what stands for a missing class token at the gate."""
    if isinstance(model, VisionTransformerDistilled):
        return "mean of the class token and the distillation token"
    if model.global_pool == "token":
        return _POOLED["token"]
    # Older timm never pools the prefix tokens; the attention pooling of EVA always does.
    with_prefix = getattr(model, "pool_include_prefix", isinstance(model, Eva) and model.global_pool == "map")
    patches_only = model.num_prefix_tokens > 0 and not with_prefix
    words = _POOLED[model.global_pool].format("patch tokens" if patches_only else "tokens")
    if model.cls_token is None:
        return f"{words} (there is no class token; at the gate the mean token stands for it)"
    return words


def refusal(name: str, what: str, reason: str) -> DualLoRAError:
    """The error for a model that cannot be a backbone."""
    return DualLoRAError(
        f"The backbone {name} is {what} and cannot carry adapters: {reason}; use a model of another family, "
        "such as vit_base_patch16_224.augreg_in21k (`duallora backbones` lists them)."
    )


def _hint(name: str) -> str:
    if name.endswith(".safetensors"):
        return "give a local file with --backbone-file and its timm architecture with --backbone"
    known = [full for module in MODULES for full in timm.list_models(module=module, pretrained=True)]
    near = difflib.get_close_matches(name, ["embedded", *known], n=3, cutoff=0.5)
    words = "give embedded, the full tag of a timm ViT, or hf: and the name of a Hugging Face ViT"
    return f"nearest: {', '.join(near)}" if near else words
