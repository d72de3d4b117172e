"""Heads that lead a training: what each reads, their loss and their answer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from duallora.methods.class_weights import ClassLoss
from duallora.methods.leader import Leader

FEATURES = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def leader(*columns: slice) -> Leader:
    return Leader(columns, 3, torch.Generator().manual_seed(1), torch.device("cpu"))


def test_each_head_reads_its_columns_alone():
    two = leader(slice(0, 4), slice(4, 8))
    first, second = two(FEATURES)
    other = FEATURES.clone()
    other[:, 4:] += 1
    assert torch.equal(two(other)[0], first)
    assert not torch.equal(two(other)[1], second)
    other[:, 4:8] = FEATURES[:, 4:8]
    assert torch.equal(two(other)[1], second)


def test_the_loss_is_the_mean_of_the_heads():
    two = leader(slice(0, 4), slice(4, 8))
    wanted = sum(F.cross_entropy(logits, LABELS) for logits in two(FEATURES)) / 2
    assert torch.allclose(two.loss(FEATURES, LABELS, ClassLoss()), wanted)


def test_the_loss_takes_the_weights_of_classes():
    weighted = ClassLoss()
    weighted.weights = torch.tensor([0.0, 0.0, 3.0])
    one = leader(slice(0, 4))
    (logits,) = one(FEATURES)
    wanted = 3 * F.cross_entropy(logits[2:3], LABELS[2:3]) / len(LABELS)
    assert torch.allclose(one.loss(FEATURES, LABELS, weighted), wanted)


def test_the_answer_is_one_of_all_heads():
    two = leader(slice(0, 4), slice(4, 8))
    first, second = (logits.log_softmax(1) for logits in two(FEATURES))
    assert torch.allclose(two.current(FEATURES), (first + second) / 2)


def test_gradients_reach_every_head():
    two = leader(slice(0, 4), slice(4, 8))
    two.loss(FEATURES, LABELS, ClassLoss()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in two.parameters())
