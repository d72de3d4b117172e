"""A ViT's forward pass with prompts, written out in fp64 around timm's weights, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from duallora.backbones.backbone import Backbone


def written_attention(attention: nn.Module, x: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """Softmax attention of tokens x (B, N, d) over themselves and a prefix, image by image, head by head."""
    width = attention.num_heads * attention.head_dim
    result = []
    for i, tokens in enumerate(x):
        q, k, v = attention.qkv(tokens).split(width, -1)
        if prefix is not None:  # before the tokens, as in the released code
            k, v = torch.cat([prefix[0][i], k]), torch.cat([prefix[1][i], v])
        heads = []
        for h in range(attention.num_heads):
            part = slice(h * attention.head_dim, (h + 1) * attention.head_dim)
            qh, kh = attention.q_norm(q[:, part]), attention.k_norm(k[:, part])
            heads.append((qh @ kh.T / attention.head_dim**0.5).softmax(-1) @ v[:, part])
        result.append(attention.proj(attention.norm(torch.cat(heads, -1))))
    return torch.stack(result)


def written_features(
    backbone: Backbone,
    images: Tensor,
    prefixes: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """All that class rows read (B, row_dim), the final feature first, in fp64.

    ``backbone`` is a fresh one that nothing has been put into.

    Args:
        backbone: stays as it is.
        images: (B, 3, H, W).
        prefixes: keys and values (B, L, d) by layer.
        tokens: (B, L, d) beside the input of the first block; the feature is the mean of their outputs then.
    """
    assert not backbone.plain_qkv and not any(m._forward_pre_hooks for m in backbone.modules())
    model = copy.deepcopy(backbone.model).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images.double())))
    count, prefix_tokens = x.shape[1], model.num_prefix_tokens
    early, below = max(1, len(model.blocks) // 3), []
    if tokens is not None:
        x = torch.cat([x, tokens.double()], 1)
    for layer, block in enumerate(model.blocks):
        found = (prefixes or {}).get(layer)
        if layer == early:
            entering = block.norm1(x)[:, :count]
            below = [entering[:, 0]] if model.cls_token is not None else []
            below.append(entering[:, prefix_tokens:].mean(1))
        prefix = None if found is None else (found[0].double(), found[1].double())
        x = x + block.ls1(written_attention(block.attn, block.norm1(x), prefix))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    last = model.norm(x[:, :count])
    if tokens is None:
        final = model.forward_head(last, pre_logits=True)
    else:
        final = model.fc_norm(model.norm(x[:, count:]).mean(1))
    above = [] if model.global_pool == "avg" else [last[:, prefix_tokens:].mean(1)]
    return torch.cat([final, *above, *below], 1)


def written_feature(
    backbone: Backbone,
    images: Tensor,
    prefixes: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The final features (B, d) among :func:`written_features`."""
    return written_features(backbone, images, prefixes, tokens)[:, : backbone.feature_dim]
