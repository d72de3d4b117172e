"""MOS: what draws an adapter to the earlier ones, the contrast, and how an image finds its adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_carried, exact_learner, small_config, unseen
from tiny import FAMILIES, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner
from duallora.methods import Batch, TaskInfo
from duallora.methods.mos import MOS

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
TASKS = [Patterns(NAMES[2 * t : 2 * t + 2], 6, t) for t in range(4)]
FOUR = Batch(tiny_images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))


def learned(tasks: int = 3, **changes: Any) -> tuple[ContinualLearner, MOS]:
    learner = exact_learner(small_config("mos", **changes))
    for task in TASKS[:tasks]:
        learner.learn(task)
    assert isinstance(learner.method, MOS)
    return learner, learner.method


def prepared(tasks: int, **changes: Any) -> MOS:
    """A method that stands before the training of a task."""
    _, method = learned(tasks, **changes)
    method.prepare(TaskInfo(tasks, "next", ("yak", "zebra")), lambda: iter(()))
    return method


def adapters(method: MOS) -> list[Tensor]:
    """All numbers of the adapters of each task, in a row."""
    found = zip(*(layer.tasks for layer in method.layers), strict=True)
    return [torch.cat([p.detach().flatten() for b in of_task for p in b.parameters()]) for of_task in found]


def mean_of(method: MOS) -> Tensor:
    return torch.cat([p.flatten() for b in method.means for p in b.parameters()])


# -- merging -------------------------------------------------------------------------------------------------


def test_an_adapter_starts_as_the_last_one_and_is_alone_in_training() -> None:
    method = prepared(2)
    before = adapters(method)
    assert torch.equal(before[2], before[1]) and not torch.equal(before[1], before[0])
    method.loss(FOUR).backward()
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    head = sum(p.numel() for p in method.heads.tasks[-1].parameters())
    assert sum(p.numel() for p in trained) == before[2].numel() + head
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize(("repeated", "times"), [(False, 1), (True, 3)])
def test_a_step_draws_the_adapter_to_the_mean_of_the_earlier_ones(repeated: bool, times: int) -> None:
    method = prepared(2, merge=0.2, repeated_merge=repeated)  # two layers, and once more
    earlier = mean_of(method)
    if not repeated:
        torch.testing.assert_close(earlier, (adapters(method)[0] + adapters(method)[1]) / 2)
    for layer in method.layers:
        for p in layer.tasks[2].parameters():
            p.data.normal_(generator=torch.Generator().manual_seed(3))
    before = adapters(method)
    method.after_step()
    after, share = adapters(method), 0.8**times
    torch.testing.assert_close(after[2], share * before[2] + (1 - share) * earlier)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_the_first_task_is_not_drawn_anywhere() -> None:
    method = prepared(0)
    before = adapters(method)
    method.after_step()
    assert torch.equal(adapters(method)[0], before[0])


def test_repeated_merges_leave_the_mean_of_the_adapters_trained_before() -> None:
    """The adapter of the second task is then the first, that of the third lies between the trained two."""
    _, method = learned(3, repeated_merge=True)
    found = adapters(method)
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[0])
    _, other = learned(2, repeated_merge=True)
    torch.testing.assert_close(found[2], mean_of(other))
    _, plain = learned(3)
    torch.testing.assert_close(mean_of(plain), sum(adapters(plain)) / 3)


def test_features_are_kept_apart_from_class_means_and_one_another() -> None:
    method = prepared(2, contrast=0.5)
    with torch.no_grad(), method._acting.holding(2):
        f = method.final(method.backbone(FOUR.images))
    points = [*method.gaussians.mean, *f]
    assert len(points) == 8
    total = torch.zeros(())
    for i, x in enumerate(points):
        products = torch.stack([x @ y for y in points]) / 0.8
        total = total - products.log_softmax(0)[i] / 8
    plain = F.cross_entropy(method.heads.tasks[-1](f), FOUR.labels)
    expected = float(plain + 0.5 * total)
    assert float(total) > 1e-3, "the case says nothing"
    assert float(method.loss(FOUR).detach()) == pytest.approx(expected, rel=1e-4)


# -- answers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_under(method: MOS, image: Tensor, task: int) -> Tensor:
    with method._acting.holding(task):
        found: Tensor = method.backbone(image[None])[0]
    return found


@torch.no_grad()
def found_by_hand(method: MOS, image: Tensor, rounds: int) -> tuple[int, Tensor, list[int]]:
    """The loop of the paper for one image: its last task, the answer, and all tasks it went through."""
    weight = torch.cat([head.weight for head in method.heads.tasks])
    bias = torch.cat([head.bias for head in method.heads.tasks])
    width = method.backbone.feature_dim
    similar = F.cosine_similarity(features_under(method, image, 0)[:width][None], method.prototypes.mean)
    way = [int(similar.argmax()) // 2]
    while True:
        logits = weight @ features_under(method, image, way[-1])[:width] + bias
        following = int(logits.argmax()) // 2
        if following == way[-1] or len(way) == rounds:
            break
        way.append(following)
    answer = (logits.softmax(0) + (len(method.heads.tasks) * similar).softmax(0)) / 2
    return way[-1], answer, way


@pytest.mark.parametrize("rounds", [4, 2])
def test_an_image_goes_on_with_the_task_of_its_answer(rounds: int) -> None:
    """With four rounds all adapters are looked at beforehand, with two each round is a pass."""
    learner, method = learned(4, rounds=rounds)
    assert learner.forward_passes == (4 if rounds == 4 else 3)
    with torch.no_grad():  # heads that disagree with the prototypes send images on
        for head in method.heads.tasks:
            head.weight.add_(0.1 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)))
    data = unseen(TASKS, 5)
    images = torch.stack([learner.preprocess(image) for image in data.images])
    with torch.no_grad():
        encoding = method.encode(images)
    ways = []
    for i, image in enumerate(images):
        last, answer, way = found_by_hand(method, image, rounds)
        assert int(encoding.chosen[i]) == last
        torch.testing.assert_close(encoding.logits[i].exp(), answer, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            encoding.features[i], features_under(method, image, last), rtol=0, atol=1e-4
        )
        ways.append(len(way))
    assert max(ways) > 1 and min(ways) == 1, "the case says nothing"


def test_without_the_ensemble_the_last_answer_stands_alone() -> None:
    learner, method = learned(2, ensemble=False)
    images = tiny_images(3)
    with torch.no_grad():
        encoding = method.encode(images)
        expected = method.heads(encoding.features).softmax(1)
    torch.testing.assert_close(encoding.logits.exp(), expected)
    assert learner.forward_passes == 2


def test_prototypes_are_means_under_the_first_adapter() -> None:
    learner, method = learned(3)
    assert method.prototypes.mean.shape == (6, method.backbone.feature_dim)
    for row, name in ((1, "bee"), (4, "elk")):
        patterns = TASKS[row // 2]
        own = [
            x for x, k in zip(patterns.images, patterns.targets, strict=True) if patterns.classes[k] == name
        ]
        found = [features_under(method, learner.preprocess(image), 0) for image in own]
        mean = method.final(torch.stack(found)).mean(0)
        expected = F.normalize(mean, dim=0)
        torch.testing.assert_close(method.prototypes.mean[row], expected, rtol=0, atol=1e-5)


def test_a_forgotten_task_is_never_found_and_the_first_adapter_stays() -> None:
    learner, method = learned(4)
    before = adapters(method)
    for task in (0, 2):
        method.forget(task, torch.zeros(2, dtype=torch.bool))
    after = adapters(method)
    assert torch.equal(after[0], before[0]) and not after[2].any()
    assert method.prototypes.mean.shape[0] == len(method.gaussians.mean) == 4
    with torch.no_grad():
        chosen = method.encode(tiny_images(8)).chosen
    assert chosen is not None and set(chosen.tolist()) <= {1, 3}
    assert learner.forward_passes == 3
    method.forget(3, torch.zeros(2, dtype=torch.bool))
    method.grow(4)  # starts as the last that is left, not from zero
    assert torch.equal(adapters(method)[4], before[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    assert_carried("mos", family)
