"""Streamed moments, and which rows enter them."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_backbone, tiny_images
from torch import Tensor, nn

from duallora.adapters.dual_lora import AdaptedQKV
from duallora.adapters.moments import Moment, TokenReader, gather_moments
from duallora.adapters.subspace import Subspace
from duallora.adapters.wrapped_qkv import wrap_attention
from duallora.backbones.backbone import Backbone

DIM, HEADS, PATCHES = 32, 2, 16


def rows_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.1, 3, DIM
    )


def naive_moment(rows: Tensor) -> Tensor:
    total = torch.zeros(DIM, DIM, dtype=torch.float64)
    for row in rows.reshape(-1, DIM).double():
        total += torch.outer(row, row)
    return total / rows.reshape(-1, DIM).shape[0]


def test_a_stream_of_unequal_batches_equals_one_batch() -> None:
    rows, stream, whole = rows_of(400), Moment(DIM), Moment(DIM)
    for batch in rows.split([1, 3, 60, 100, 236]):
        stream.add(batch)
    whole.add(rows)
    expected = naive_moment(rows)
    assert stream.rows == whole.rows == 400
    assert torch.allclose(stream.value, expected, atol=1e-6)
    assert torch.allclose(whole.value, expected, atol=1e-6)
    of_means = sum(naive_moment(batch) for batch in rows.split([1, 3, 60, 100, 236])) / 5
    assert not torch.allclose(of_means, expected, atol=1e-2), "a mean of batch means would go unnoticed"


def test_sums_of_two_ranks_add_up() -> None:
    rows, left, right = rows_of(300), Moment(DIM), Moment(DIM)
    left.add(rows[:100].reshape(10, 10, DIM))
    right.add(rows[100:].reshape(4, 50, DIM))
    assert left.rows + right.rows == 300
    assert torch.allclose((left.total + right.total) / 300, naive_moment(rows), atol=1e-6)


def test_sums_stay_exact_over_many_batches() -> None:
    # Whole numbers: the sums of one batch are exact in fp32, those of many batches are too large for it.
    rows, stream, careless = (rows_of(50) + 30).round(), Moment(DIM), torch.zeros(DIM, DIM)
    for _ in range(400):
        stream.add(rows)
        careless += rows.T @ rows
    expected = naive_moment(rows)
    assert torch.allclose(stream.value, expected, rtol=1e-12)
    assert not torch.allclose(careless.double() / stream.rows, expected, rtol=1e-12), "not so in fp32"


def test_no_rows_give_a_zero_moment() -> None:
    assert torch.equal(Moment(DIM).value, torch.zeros(DIM, DIM, dtype=torch.float64))


@pytest.mark.parametrize(
    ("class_token", "prefix", "layer", "expected"),
    [
        (True, 1, 1, "class"),
        (True, 2, 3, "class"),
        (True, 1, 0, "patches"),
        (True, 5, 0, "patches"),
        (False, 0, 0, "patches"),
        (False, 0, 4, "patches"),
        (False, 4, 1, "patches"),
    ],
)
def test_what_stands_for_an_image(class_token: bool, prefix: int, layer: int, expected: str) -> None:
    x = torch.randn(3, prefix + PATCHES, DIM)
    found = TokenReader(class_token, prefix).summary(x, layer)
    if expected == "class":
        assert torch.equal(found, x[:, 0])
    else:
        mean = torch.stack([x[:, i] for i in range(prefix, prefix + PATCHES)]).mean(0)
        assert torch.allclose(found, mean, atol=1e-6)


@pytest.mark.parametrize(
    ("class_token", "prefix", "layer", "parts"),
    [(True, 1, 1, 2), (True, 5, 2, 2), (True, 1, 0, 1), (False, 0, 0, 1), (False, 0, 4, 1), (False, 4, 1, 1)],
)
def test_what_the_gate_reads_of_an_image(class_token: bool, prefix: int, layer: int, parts: int) -> None:
    """The mean patch token; before it the class token, where that has seen the image already."""
    x = torch.randn(3, prefix + PATCHES, DIM)
    reader = TokenReader(class_token, prefix)
    assert reader.parts(layer) == parts
    found = reader.description(x.bfloat16(), layer)
    assert found.dtype == torch.float32 and found.shape == (3, parts * DIM)
    found = reader.description(x, layer)
    mean = torch.stack([x[:, i] for i in range(prefix, prefix + PATCHES)]).mean(0)
    assert torch.allclose(found[:, -DIM:], mean, atol=1e-6)
    assert parts == 1 or torch.equal(found[:, :DIM], x[:, 0])
    assert torch.equal(found[:, :DIM], reader.summary(x, layer)), "energies are read of the first columns"


def wrapped(
    family: str = "vit", groups: tuple[str, ...] = ("q", "k", "v")
) -> tuple[Backbone, dict[int, AdaptedQKV]]:
    backbone = tiny_backbone(family)
    return backbone, wrap_attention(backbone, [0, 1], lambda qkv: AdaptedQKV(qkv, groups))


def layer_inputs(backbone: Backbone, images: Tensor) -> dict[int, Tensor]:
    """What enters attention, caught beside the code under test."""
    found: dict[int, Tensor] = {}
    handles = [
        backbone.attention(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: found.__setitem__(layer, args[0].detach().double())
        )
        for layer in range(backbone.depth)
    ]
    with torch.no_grad():
        backbone(images)
    for handle in handles:
        handle.remove()
    return found


def naive_pooled(qkv: nn.Linear, x: Tensor, query_tokens: list[int]) -> Tensor:
    """``softmax(q K^T / sqrt(d_h)) X`` for the mean query of some tokens, image by image, head by head."""
    width, rows = DIM // HEADS, []
    weight, bias = qkv.weight.double(), qkv.bias.double()
    for tokens in x.double():
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            queries = tokens @ weight[:DIM][part].T + bias[:DIM][part]
            keys = tokens @ weight[DIM : 2 * DIM][part].T + bias[DIM : 2 * DIM][part]
            query = torch.stack([queries[t] for t in query_tokens]).mean(0)
            logits = torch.stack([query @ key / width**0.5 for key in keys])
            share = logits.exp() / logits.exp().sum()
            rows.append(sum(share[t] * tokens[t] for t in range(len(tokens))))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("family", "layer", "query_tokens"),
    [
        ("vit", 1, [0]),
        ("vit", 0, list(range(1, 1 + PATCHES))),
        ("deit_distilled", 1, [0]),
        ("dinov2_registers", 1, [0]),
        ("dinov2_registers", 0, list(range(5, 5 + PATCHES))),
        ("siglip", 1, list(range(PATCHES))),
    ],
)
def test_attention_pooled_inputs_equal_a_softmax_written_out(
    family: str, layer: int, query_tokens: list[int]
) -> None:
    backbone, adapted = wrapped(family)
    reader = TokenReader(backbone.has_class_token, backbone.num_prefix_tokens)
    x = layer_inputs(backbone, tiny_images(3))[layer]
    attention = backbone.attention(layer)
    with torch.no_grad():
        found = reader.pooled_inputs(attention, x.float(), adapted[layer](x.float()), layer)
        expected = naive_pooled(adapted[layer].base, x, query_tokens)
    assert found.shape == (3 * HEADS, DIM)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert float(expected.std()) > 0.05


def gathered(family: str, kind: str, images: Tensor) -> tuple[Backbone, dict[tuple[int, str], Moment]]:
    backbone, adapted = wrapped(family)
    reader = TokenReader(backbone.has_class_token, backbone.num_prefix_tokens)
    attentions = {layer: backbone.attention(layer) for layer in adapted}
    with gather_moments(adapted, attentions, reader, kind) as moments, torch.no_grad():
        for batch in images.split(3):
            backbone(batch)
    before = moments[1, "k"].rows
    backbone(images[:1])
    assert moments[1, "k"].rows == before, "nothing may be gathered after the context"
    return backbone, moments


def test_token_moments_take_all_tokens_of_every_projection() -> None:
    images = tiny_images(7)
    backbone, moments = gathered("vit", "tokens", images)
    inputs = layer_inputs(backbone, images)
    for (layer, _), moment in moments.items():
        assert moment.rows == 7 * (PATCHES + 1)
        assert torch.allclose(moment.value, naive_moment(inputs[layer]), atol=1e-5)
    assert set(moments) == {(layer, group) for layer in (0, 1) for group in "qkv"}


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "siglip"])
def test_class_token_moments_are_of_the_class_token_for_q_pooled_for_v_and_of_all_tokens_for_k(
    family: str,
) -> None:
    images = tiny_images(5)
    backbone, moments = gathered(family, "class_token", images)
    prefix = backbone.num_prefix_tokens
    for layer, x in layer_inputs(backbone, images).items():
        patches = list(range(prefix, x.shape[1]))
        uses_class_token = backbone.has_class_token and layer > 0
        summary = x[:, 0] if uses_class_token else x[:, patches].mean(1)
        qkv = backbone.plain_qkv[layer]
        pooled = naive_pooled(qkv, x, [0] if uses_class_token else patches)
        assert torch.allclose(moments[layer, "q"].value, naive_moment(summary), atol=1e-5)
        assert torch.allclose(moments[layer, "v"].value, naive_moment(pooled), atol=1e-5)
        assert torch.allclose(moments[layer, "k"].value, naive_moment(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "class_token"])
def test_autocast_does_not_reach_the_moments(kind: str) -> None:
    """bf16 sums would drown every direction below a hundredth of the largest in round-off."""
    images = tiny_images(5)
    backbone, adapted = wrapped()
    attentions, inputs = {layer: backbone.attention(layer) for layer in adapted}, {0: [], 1: []}
    outputs: dict[int, list[Tensor]] = {0: [], 1: []}

    def read(layer: int) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[layer].append(args[0].clone())
            outputs[layer].append(output.clone())

        return hook

    for layer, module in adapted.items():
        module.register_forward_hook(read(layer))
    reader, autocast = TokenReader(True, 1), torch.autocast("cpu", dtype=torch.bfloat16)
    with gather_moments(adapted, attentions, reader, kind) as moments, torch.no_grad(), autocast:
        backbone(images)
    for (layer, group), moment in moments.items():
        rows = inputs[layer][0].float()
        if kind == "class_token" and group == "q":
            rows = reader.summary(rows, layer)
        elif kind == "class_token" and group == "v":
            rows = reader.pooled_inputs(attentions[layer], rows, outputs[layer][0], layer)
        assert torch.allclose(moment.value, naive_moment(rows), atol=1e-5), (layer, group)


def test_hooks_are_removed_when_the_pass_fails() -> None:
    backbone, adapted = wrapped()
    attentions = {layer: backbone.attention(layer) for layer in adapted}
    with (
        pytest.raises(RuntimeError, match="cut"),
        gather_moments(adapted, attentions, TokenReader(True, 1), "tokens"),
    ):
        raise RuntimeError("cut")
    assert not any(module._forward_hooks for module in adapted.values())


def test_an_update_outside_the_pooled_inputs_leaves_the_class_tokens_attention_alone() -> None:
    """Why v may use pooled inputs: ``softmax(q_cls K^T) X dW`` is zero for ``dW`` outside their span."""
    images = tiny_images(6)
    backbone, moments = gathered("vit", "class_token", images)
    subspace = Subspace(DIM)
    subspace.grow(moments[1, "v"].value, 1.0)
    assert subspace.sizes.tolist() == [6 * HEADS]
    outputs: list[Tensor] = []
    handle = backbone.attention(1).proj.register_forward_pre_hook(
        lambda _, args: outputs.append(args[0].clone())
    )
    module = backbone.attention(1).qkv
    free = torch.eye(DIM, dtype=torch.float64) - subspace.phi @ subspace.phi.T
    with torch.no_grad():
        backbone(images)
        module.groups["v"].begin(0, free[:, :8].float(), torch.zeros(DIM, 0))
        module.groups["v"].b.normal_(generator=torch.Generator().manual_seed(1))
        backbone(images)
    handle.remove()
    before, after = outputs
    assert float((after - before)[:, 0].abs().max()) < 1e-4
    assert float((after - before)[:, 1:].abs().max()) > 0.1
