"""Heads that lead a training: what each reads, their loss and their answer."""

from __future__ import annotations

import torch
from small_tasks import tiny_backbone
from torch.nn import functional as F

from duallora.adapters.token_mixing import TokenMixing
from duallora.methods.class_weights import ClassLoss
from duallora.methods.interface import Batch, Partners
from duallora.methods.leader import MOST_MIXED, Leader

FEATURES = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])
BATCH = Batch(torch.zeros(5, 3, 1, 1), LABELS, torch.arange(5))
CPU = torch.device("cpu")


def leader(*columns: slice, classes: int = 3) -> Leader:
    mixing = TokenMixing(tiny_backbone(), 1)
    return Leader(columns, classes, mixing, torch.Generator().manual_seed(1), CPU)


def features_of(batch: Batch) -> torch.Tensor:
    return FEATURES[batch.indices]


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
    assert torch.allclose(two.loss(BATCH, features_of, ClassLoss()), wanted)


def test_the_loss_takes_the_weights_of_classes():
    weighted = ClassLoss()
    weighted.weights = torch.tensor([0.0, 0.0, 3.0])
    one = leader(slice(0, 4))
    (logits,) = one(FEATURES)
    wanted = 3 * F.cross_entropy(logits[2:3], LABELS[2:3]) / len(LABELS)
    assert torch.allclose(one.loss(BATCH, features_of, weighted), wanted)


def test_the_answer_is_one_of_all_heads():
    two = leader(slice(0, 4), slice(4, 8))
    first, second = (logits[:, :3].log_softmax(1) for logits in two(FEATURES))
    assert torch.allclose(two.current(FEATURES), (first + second) / 2)


def test_the_answer_is_among_the_classes_alone():
    found = leader(slice(0, 4)).current(FEATURES)
    assert found.shape == (5, 3)
    assert torch.allclose(found.exp().sum(1), torch.ones(5))


def test_every_pair_of_classes_has_an_output_of_its_own():
    one = leader(slice(0, 4), classes=5)
    first, second = torch.triu_indices(5, 5, 1)
    assert one.pair(first, second).tolist() == list(range(5, 15))
    assert torch.equal(one.pair(second, first), one.pair(first, second))
    assert one(FEATURES)[0].shape == (5, 15)


def test_a_mixture_counts_for_its_pair_and_by_the_weight_of_its_own_image():
    one, weighted = leader(slice(0, 4)), ClassLoss()
    weighted.weights = torch.tensor([0.5, 1.0, 1.5])
    partners = Partners(torch.ones(5, 3, 1, 1), torch.tensor([1, 2, 0, 2, 0]), torch.full((5,), 0.5))
    asked: list[Batch] = []

    def both(batch: Batch) -> torch.Tensor:
        asked.append(batch)
        return torch.cat([FEATURES, -FEATURES])

    found = one.loss(BATCH._replace(partners=partners), both, weighted)
    (logits,) = one(torch.cat([FEATURES, -FEATURES]))
    right = torch.tensor([*LABELS.tolist(), 3, 5, 4, 4, 3])
    losses = F.cross_entropy(logits, right, reduction="none") * weighted.weights[LABELS.repeat(2)]
    assert torch.allclose(found, losses.mean())
    assert asked[0].images.flatten(1).mean(1).tolist() == [0.0] * 5 + [1.0] * 5
    assert torch.equal(asked[0].labels, LABELS.repeat(2))
    assert torch.equal(asked[0].indices, torch.arange(5).repeat(2))


def test_many_classes_have_no_outputs_of_pairs():
    most, more = (leader(slice(0, 4), classes=MOST_MIXED + further) for further in (0, 1))
    assert most.mixes and not more.mixes
    assert more(FEATURES)[0].shape == (5, MOST_MIXED + 1)
    assert most(FEATURES)[0].shape == (5, MOST_MIXED * (MOST_MIXED + 1) // 2)


def test_gradients_reach_every_head():
    two = leader(slice(0, 4), slice(4, 8))
    two.loss(BATCH, features_of, ClassLoss()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in two.parameters())
