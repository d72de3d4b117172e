"""Weights of classes in the loss: the same place for every method, none where counts are alike."""

from __future__ import annotations

import pytest
import torch
from small_tasks import EVERY_METHOD, Patterns, new_learner, small_config, taught
from torch.nn import functional as F

from duallora import DualLoRAError
from duallora.methods.class_weights import ClassLoss, balanced

LED = ("joint",)  # by two heads, whose losses are both weighed


def test_classes_weigh_the_same_in_all():
    targets = [0] * 12 + [1] * 3 + [2] * 6
    weights = balanced(targets, 3)
    summed = torch.zeros(3).index_add(0, torch.tensor(targets), weights[targets])
    torch.testing.assert_close(summed, torch.full((3,), 7.0))
    assert float(weights[targets].mean()) == pytest.approx(1)


@pytest.mark.parametrize(("counts", "weighted"), [((9, 3), False), ((10, 3), True), ((4, 4, 4), False)])
def test_counts_that_differ_by_three_times_are_left_alone(counts, weighted):
    targets = [k for k, count in enumerate(counts) for _ in range(count)]
    assert (balanced(targets, len(counts)) is not None) == weighted


def test_shares_of_a_batch_add_up():
    loss, labels = ClassLoss(), torch.tensor([0, 0, 0, 1])
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss.cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    loss.weights = torch.tensor([0.5, 2.0])
    whole = loss.cross_entropy(logits, labels)
    parts = loss.cross_entropy(logits[:3], labels[:3]) * 0.75 + loss.cross_entropy(logits[3:], labels[3:]) / 4
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_every_method_trains_with_them(name, monkeypatch):
    """The losses of all images are seen once: with weights, and afterwards they are gone."""
    found = {}
    for weights in ("none", "balanced"):
        learner = new_learner(small_config(name, class_weights=weights))
        seen = []
        real = learner.method.class_loss.mean

        def mean(losses, labels, real=real, seen=seen):
            assert losses.shape == labels.shape, "a mean over images has no classes left to weigh"
            seen.append(len(labels))
            return real(losses, labels)

        monkeypatch.setattr(learner.method.class_loss, "mean", mean)
        (task,) = taught(name, [Patterns(["ant", "bee", "cow"], [12, 2, 3])])
        record = learner.learn(task)
        assert learner.method.class_loss.weights is None
        if weights == "balanced" and record.trainable_parameters:
            heads = 2 if name in LED else 1
            assert sum(seen) == 17 * heads
        found[weights] = learner.method.state()
    same = all(torch.equal(found["none"][key], value) for key, value in found["balanced"].items())
    assert same == (not record.trainable_parameters)


def test_another_word_is_refused():
    with pytest.raises(DualLoRAError, match="class_weights must be one of none, balanced"):
        small_config("lora", class_weights="some")
