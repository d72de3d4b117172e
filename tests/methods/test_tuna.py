"""TUNA: the universal adapter, the surest task, what is trained, and what the heads are aligned on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_carried, exact_learner, reloaded, small_config, three_tasks, unseen
from tiny import FAMILIES, WIDTH, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner
from duallora.methods import Batch, TaskInfo, task_adapters
from duallora.methods.tuna import TUNA, elected

FOUR = Batch(tiny_images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))


def learned(tasks: int = 3, **changes: Any) -> tuple[ContinualLearner, TUNA]:
    learner = exact_learner(small_config("tuna", **changes))
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    assert isinstance(learner.method, TUNA)
    return learner, learner.method


def prepared(tasks: int = 2, **changes: Any) -> TUNA:
    """A method that stands before the training of a task."""
    _, method = learned(tasks, **changes)
    method.prepare(TaskInfo(tasks, "next", ("yak", "zebra")), lambda: iter(()))
    return method


# -- the universal adapter -----------------------------------------------------------------------------------


def test_signs_are_elected_by_the_sum_and_sizes_by_the_largest_that_agree() -> None:
    columns = torch.tensor(
        [[3.0, -1.0, -1.0], [1.0, -2.0, -3.0], [5.0, -4.0, -2.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]
    )
    assert elected(columns.T).tolist() == [3.0, -3.0, -4.0, 0.0, -1.0]
    drawn = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    found = elected(drawn)
    for i in range(7):
        for j in range(3):
            each = drawn[:, i, j].tolist()
            sign = 1 if sum(each) > 0 else -1
            assert float(found[i, j]) == sign * max(x * sign for x in each if x * sign > 0)


def test_the_universal_adapter_is_merged_of_all_and_not_saved(tmp_path: Path) -> None:
    learner, method = learned(3)
    layer = method.layers[0]
    for found, name in zip(layer.merged, ("down", "down_bias", "up", "up_bias"), strict=True):
        each = torch.stack([b.get_parameter(name) for b in layer.own.tasks]).detach()
        assert torch.equal(found, elected(each)), name
        assert not torch.equal(found, each[2]), "the case says nothing"
    loaded = reloaded(learner, tmp_path / "model").method
    assert isinstance(loaded, TUNA)
    assert all(torch.equal(a, b) for a, b in zip(loaded.layers[0].merged, layer.merged, strict=True))
    one = 2 * WIDTH * 4 + WIDTH + 4  # numbers of a bottleneck of rank 4
    saved = sum(x.numel() for key, x in method.state().items() if key.startswith("adapters."))
    assert saved == 3 * len(method.layers) * one


def test_a_forgotten_task_has_no_part_in_it() -> None:
    learner, method = learned(3)
    method.forget(1, torch.zeros(3, dtype=torch.bool))
    layer = method.layers[0]
    each = torch.stack([layer.own.tasks[task].get_parameter("down") for task in (0, 2)]).detach()
    assert torch.equal(layer.merged[0], elected(each))
    assert not any(p.any() for p in layer.own.tasks[1].parameters())
    assert learner.forward_passes == 3
    method.forget(0, torch.zeros(2, dtype=torch.bool))
    assert learner.forward_passes == 1
    assert learner.outputs(unseen(three_tasks())).heads.shape[1] == 2


# -- answers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_under(method: TUNA, image: Tensor, task: int | None) -> tuple[Tensor, Tensor]:
    """Features and probabilities of all classes for one image, written out; None: the universal adapter."""
    with method._acting.holding(0 if task is None else task), method._universal.holding(task is None):
        features = method.backbone(image[None])[0]
    weight = torch.cat([head.weight for head in method.heads.tasks])
    cosine = F.cosine_similarity(features[: method.backbone.feature_dim][None], weight)
    return features, (20 * cosine).softmax(0)


def test_the_surest_task_and_the_universal_adapter_answer() -> None:
    learner, method = learned(3)
    data = unseen(three_tasks(), 4)
    images = torch.stack([learner.preprocess(image) for image in data.images])
    with torch.no_grad():
        encoding = method.encode(images)
    assert encoding.chosen is not None and len(encoding.chosen.unique()) > 1
    apart = 0.0
    for i, image in enumerate(images):
        each = [answer_under(method, image, task) for task in range(3)]
        entropies = [-float((p * p.log()).sum()) for _, p in each]
        best = entropies.index(min(entropies))
        assert int(encoding.chosen[i]) == best
        _, universal = answer_under(method, image, None)
        features, surest = each[best]
        apart = max(apart, float((universal - surest).abs().max()))
        torch.testing.assert_close(encoding.logits[i].exp(), (surest + universal) / 2, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoding.features[i], features, rtol=0, atol=1e-4)
    assert apart > 1e-3, "the case says nothing"
    assert learner.forward_passes == 4


def test_one_task_needs_no_universal_adapter() -> None:
    learner, method = learned(1)
    with torch.no_grad():
        encoding = method.encode(FOUR.images)
    for i, image in enumerate(FOUR.images):
        _, expected = answer_under(method, image, 0)
        torch.testing.assert_close(encoding.logits[i].exp(), expected, rtol=0, atol=1e-5)
    assert learner.forward_passes == 1


# -- training ------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_cosines_and_of_overlapping_up_projections() -> None:
    method = prepared(2, orthogonality=30.0, margin=0.1)
    with torch.no_grad(), method._acting.holding(2):
        f = method.final(method.backbone(FOUR.images))
        scores = 20 * F.normalize(f) @ F.normalize(method.heads.tasks[2].weight).T
        scores[torch.arange(4), FOUR.labels] -= 2.0
        overlap = 0.0
        for earlier in (0, 1):
            for layer in method.layers:
                old, new = (layer.own.tasks[t].up for t in (earlier, 2))  # (r, d)
                cosines = [float(F.cosine_similarity(a, b, dim=0)) for b in old.T for a in new.T]
                overlap += abs(sum(cosines) / WIDTH**2) / len(method.layers)
    expected = float(F.cross_entropy(scores, FOUR.labels)) + 30.0 * math.exp(-3) * overlap
    assert overlap > 1e-2, "the case says nothing"
    assert float(method.loss(FOUR).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_new_adapter_starts_as_the_last_one_and_is_trained_alone_with_the_head() -> None:
    method = prepared(2)
    for layer in method.layers:
        for name, p in layer.own.tasks[2].named_parameters():
            assert torch.equal(p, layer.own.tasks[1].get_parameter(name)) and p.requires_grad
    method.loss(FOUR).backward()
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    newest = {id(p) for layer in method.layers for p in layer.own.tasks[2].parameters()}
    assert trained == newest | {id(method.heads.tasks[2].weight)}
    for layer in method.layers:
        for task in (0, 1):
            assert all(p.grad is None for p in layer.own.tasks[task].parameters())


@pytest.mark.parametrize("decay", [True, False])
def test_heads_are_aligned_on_means_that_age(decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    original = task_adapters.refit

    def watched(heads: Any, mean: Tensor, *rest: Any, logits: Any, **named: Any) -> None:
        x, weight = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)), torch.eye(3, WIDTH)
        scores = logits(x, weight, torch.ones(3))
        torch.testing.assert_close(scores, 20 * F.normalize(x)[:, :3])
        given.append((mean.clone(), method.gaussians.mean.clone()))
        original(heads, mean, *rest, logits=logits, **named)

    monkeypatch.setattr(task_adapters, "refit", watched)
    learner = exact_learner(small_config("tuna", decay=decay))
    method = learner.method
    assert isinstance(method, TUNA)
    for task in three_tasks():
        learner.learn(task)
    assert len(given) == 2, "not after the first task"
    mean, stored = given[1]
    age = torch.tensor([1 / 3] * 2 + [2 / 3] * 3 + [1.0] * 2) if decay else torch.ones(7)
    torch.testing.assert_close(mean, stored * (0.9 + 0.1 * age)[:, None])


def test_gaussians_lie_under_a_tasks_own_adapter() -> None:
    learner, method = learned(2)
    patterns: Patterns = three_tasks()[0]
    own = [learner.preprocess(x) for x, k in zip(patterns.images, patterns.targets, strict=True) if k == 0]
    features = torch.stack([answer_under(method, image, 0)[0] for image in own])
    torch.testing.assert_close(method.gaussians.mean[0], method.final(features).mean(0), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    assert_carried("tuna", family)
