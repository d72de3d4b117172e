"""O-LoRA: its loss written out, what gets gradients, and that the term does what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_carried, new_learner, small_config, three_tasks
from tiny import FAMILIES, WIDTH, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora.methods import Batch, TaskInfo
from duallora.methods.o_lora import OLoRA


def learned(tasks: int = 2, **changes: Any) -> OLoRA:
    learner = new_learner(small_config("o-lora", **changes), depth=3)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    assert isinstance(learner.method, OLoRA)
    return learner.method


def prepared(**changes: Any) -> OLoRA:
    """A method inside the training of its third task: B is no longer zero."""
    method = learned(**changes)
    method.prepare(TaskInfo(2, "next", ("fox", "gnu")), lambda: iter(()))
    for pairs in method.pairs:
        pairs.b[-1].data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return method


def batch() -> Batch:
    return Batch(tiny_images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))


def overlaps(method: OLoRA) -> list[Tensor]:
    """``A_i^T A_t`` of every layer, projection and earlier task."""
    return [
        pairs.a[i][p].T @ pairs.a[-1][p]
        for pairs in method.pairs
        for p in range(2)
        for i in range(len(pairs.a) - 1)
    ]


@pytest.mark.parametrize("overlap", ["absolute", "squared"])
def test_the_loss_equals_its_formula(overlap: str) -> None:
    method = prepared(lamda_1=0.3, lamda_2=0.07, overlap=overlap)
    cross_entropy = F.cross_entropy(method.heads.current(method.features(batch().images)), batch().labels)
    products = [product.detach() for product in overlaps(method)]
    assert len(products) == 2 * 2 * 2 and products[0].shape == (4, 4)
    if overlap == "absolute":
        term = sum(float(abs(x)) for product in products for x in product.flatten())
    else:
        term = sum(float(x) ** 2 for product in products for x in product.flatten())
    norms = sum(
        float(x.detach()[p].square().sum().sqrt())
        for pairs in method.pairs
        for x in (pairs.a[-1], pairs.b[-1])
        for p in range(2)
    )
    assert term > 0.1 and norms > 1
    expected = cross_entropy.item() + 0.3 * term + 0.07 * norms
    assert method.loss(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_without_weights_or_earlier_tasks_the_loss_is_cross_entropy() -> None:
    for method in (prepared(lamda_1=0.0), learned(0, lamda_1=100.0)):
        if not method.heads.tasks:
            method.prepare(TaskInfo(0, "first", ("fox", "gnu")), lambda: iter(()))
        expected = F.cross_entropy(method.heads.current(method.features(batch().images)), batch().labels)
        assert torch.equal(method.loss(batch()), expected)


def test_the_term_pulls_at_the_newest_down_projection_alone() -> None:
    method = prepared()
    method.orthogonality().backward()
    for pairs in method.pairs:
        for i, (a, b) in enumerate(zip(pairs.a, pairs.b, strict=True)):
            assert b.grad is None and (a.grad is None) == (i < 2)
        # d/dA_t of sum |A_i^T A_t| = sum_i A_i sign(A_i^T A_t)
        for p in range(2):
            expected = sum(pairs.a[i][p] @ (pairs.a[i][p].T @ pairs.a[2][p]).sign() for i in range(2))
            torch.testing.assert_close(pairs.a[2].grad[p], expected.detach(), rtol=0, atol=1e-5)


def test_earlier_pairs_are_frozen_and_active() -> None:
    learner = new_learner(small_config("o-lora"), depth=3)
    method = learner.method
    assert isinstance(method, OLoRA)
    kept: list[Tensor] = []
    for task in three_tasks():
        learner.learn(task)
        now = [x for pairs in method.pairs for x in (pairs.a[0], pairs.b[0])]
        kept = kept or [x.detach().clone() for x in now]
        assert all(torch.equal(x, then) for x, then in zip(now, kept, strict=True))
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    for wrapper, pairs in zip(method.beside.values(), method.pairs, strict=True):
        expected = x.double() @ wrapper.base.weight.double().T + wrapper.base.bias.double()
        for i in range(3):
            for p, start in enumerate((0, 2 * WIDTH)):  # q and v
                update = pairs.a[i][p].double() @ pairs.b[i][p].double()
                assert float(update.detach().norm()) > 1e-3
                expected[..., start : start + WIDTH] += x.double() @ update
        assert wrapper.effective is not None
        torch.testing.assert_close(wrapper(x).double(), expected, rtol=0, atol=2e-5)
        wrapper.separate()
        torch.testing.assert_close(wrapper(x).double(), expected, rtol=0, atol=2e-5)


def test_the_term_makes_the_down_projections_more_orthogonal() -> None:
    def cosines(**changes: Any) -> float:
        method = learned(3, rank=2, epochs=4, **changes)
        found = [
            F.normalize(pairs.a[i][p], dim=0).T @ F.normalize(pairs.a[2][p], dim=0)
            for pairs in method.pairs
            for p in range(2)
            for i in range(2)
        ]
        return torch.stack(found).abs().mean().item()

    assert cosines(lamda_1=0.5) < 0.5 * cosines(lamda_1=0.0)


def test_the_norm_term_keeps_the_pair_small() -> None:
    def size(lamda_2: float) -> float:
        return learned(1, epochs=3, lamda_2=lamda_2).size().item()

    assert size(1.0) < 0.9 * size(0.0)


def test_a_single_class_adds_nothing_and_nothing_has_to_avoid_it() -> None:
    learner = new_learner(small_config("o-lora"), depth=3)
    method = learner.method
    assert isinstance(method, OLoRA)
    learner.learn(three_tasks()[0])
    features = learner.outputs(three_tasks()[0]).features
    learner.learn(Patterns(["hen"], 5))
    assert not any(pairs.b[1].any() for pairs in method.pairs)
    # Up to rounding: the products of all pairs are one product, which the zeros make longer.
    torch.testing.assert_close(learner.outputs(three_tasks()[0]).features, features, rtol=0, atol=1e-5)
    method.prepare(TaskInfo(2, "next", ("fox", "gnu")), lambda: iter(()))
    expected = sum(
        (pairs.a[0][p].T @ pairs.a[2][p]).abs().sum().item() for pairs in method.pairs for p in range(2)
    )
    assert method.orthogonality().item() == pytest.approx(expected, rel=1e-5)
    assert method.orthogonality().item() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_carry_it(family: str) -> None:
    assert_carried("o-lora", family)
