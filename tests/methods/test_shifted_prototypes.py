"""SSIAT and RSIAT: cosine heads, prototypes that follow the shift, and what RSIAT adds to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refit_tools import TASKS, loader_of, prepared, started, state_of
from tiny import WIDTH
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from duallora import METHODS, ContinualLearner
from duallora.classifiers.cosine import cosface_logits, cosines
from duallora.methods.drift import semantic_shift
from duallora.methods.rsiat import RSIAT, Projector, steering_loss

both = pytest.mark.parametrize("name", ["ssiat", "rsiat"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_shift_equals_its_formula() -> None:
    x, y, points = drawn(7, 5).double(), drawn(7, 5, seed=1).double(), drawn(3, 5, seed=2).double()
    found = semantic_shift(x, y, points, 4, 1.5)
    for p, shift in zip(points, found, strict=True):
        distance = (x[:, :4] - p[:4]).square().sum(1)
        weight = torch.exp(-distance / (2 * 1.5**2)) + 1e-5
        assert_close(shift, (weight[:, None] * (y - x)).sum(0) / weight.sum())


def test_far_from_all_images_every_one_counts_alike() -> None:
    x, y = drawn(6, 4).double(), drawn(6, 4, seed=1).double()
    assert_close(semantic_shift(x, y, x[:1] + 1e3, 4, 2.0)[0], (y - x).mean(0))
    near = semantic_shift(x, y, x[:1], 4, 0.05)[0]  # the only image in reach
    assert_close(near, (y - x)[0], rtol=1e-2, atol=1e-2)


def test_cosface_takes_the_margin_off_the_right_class() -> None:
    cosine, labels = cosines(drawn(4, 6), drawn(3, 6, seed=1)), torch.tensor([0, 2, 1, 2])
    lowered = cosine.clone()
    lowered[torch.arange(4), labels] -= 0.3
    assert_close(cosface_logits(cosine, labels, 20.0, 0.3), 20 * lowered)
    assert float(cosine.abs().max()) <= 1


def shifted(name: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Learns task 1 after task 0; the states after and before, and features of task 1 before and after."""
    learner = started(name, 1, learning_rate=0.05, epochs=3, **changes)
    before, images = state_of(learner), next(loader_of(learner, TASKS[1])()).images
    x = learner.method.extract(images).detach()
    learner.learn(TASKS[1])
    return state_of(learner), before, x, learner.method.extract(images).detach()


@both
def test_old_prototypes_follow_the_shift(name: str) -> None:
    after, before, x, y = shifted(name)
    shift = semantic_shift(x, y, before["rows.mean"], WIDTH, 4.0)
    assert float(shift[:, :WIDTH].abs().max()) > 1e-3
    near = {"rtol": 1e-4, "atol": 1e-4}
    assert_close(after["rows.mean"][:2], before["rows.mean"] + shift, **near)
    assert_close(
        after["gaussians.mean"][:2].double(), before["gaussians.mean"].double() + shift[:, :WIDTH], **near
    )
    assert torch.equal(after["gaussians.covariance"][:2], before["gaussians.covariance"])


@both
def test_without_it_they_stay(name: str) -> None:
    after, before, x, y = shifted(name, shift=False)
    assert float((x - y)[:, :WIDTH].abs().max()) > 1e-2, "the features did move"
    assert torch.equal(after["gaussians.mean"][:2], before["gaussians.mean"])
    assert torch.equal(after["rows.mean"][:2], before["rows.mean"])


@both
def test_alignment_changes_heads_alone_and_from_the_second_task_on(name: str) -> None:
    for tasks in (1, 2):
        plain = started(name, tasks, refit_epochs=0).method.state()
        for key, x in started(name, tasks).method.state().items():
            aligned = tasks > 1 and key.startswith("heads") and key.endswith("weight")
            assert torch.equal(x, plain[key]) != aligned, key


@both
def test_heads_answer_by_the_angle(name: str) -> None:
    learner = started(name, 2)
    images = next(loader_of(learner, TASKS[0])()).images
    before = learner.method.logits(images).heads
    with torch.no_grad():
        for head in learner.method.heads.tasks:
            head.get_parameter("weight").mul_(3)
    assert_close(learner.method.logits(images).heads, before)
    assert all(not head.get_parameter("bias").any() for head in learner.method.heads.tasks)


def test_one_adapter_is_trained_in_every_task() -> None:
    learner = started("ssiat", 1)
    before = state_of(learner)
    learner.learn(TASKS[1])
    after = state_of(learner)
    names = [key for key in before if key.startswith("adapters.")]
    assert names and names == [key for key in after if key.startswith("adapters.")]
    assert all(not torch.equal(after[key], before[key]) for key in names)


# -- RSIAT ---------------------------------------------------------------------------------------------------


def rsiat(learner: ContinualLearner) -> RSIAT:
    assert isinstance(learner.method, RSIAT)
    return learner.method


def test_the_projector_equals_its_formula() -> None:
    projector, x = Projector(6, 5, torch.Generator().manual_seed(0)), drawn(4, 6)
    layers: list[nn.Module] = []
    for weight, bias in zip(projector.weights, projector.biases, strict=True):
        layer = nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = weight.detach().T.contiguous(), bias.detach()
        layers += [layer, nn.GELU()]
    expected = x + nn.Sequential(*layers[:-1], nn.Sigmoid())(x)
    assert_close(projector(x), expected)
    assert [tuple(w.shape) for w in projector.weights] == [(6, 64), (64, 5), (5, 64), (64, 6)]


def test_steering_pulls_a_class_together_and_others_apart() -> None:
    f, labels = drawn(5, 6), torch.tensor([0, 0, 1, 1, 1])
    cosine = cosines(f, f)
    same, other = [], []
    for i in range(5):
        for j in range(5):
            if i != j:
                (same if labels[i] == labels[j] else other).append(cosine[i, j])
    pull = (1 - torch.stack(same)).relu().mean()
    push = (torch.stack(other) - 0.1).relu().mean()
    assert_close(steering_loss(f, labels, 1.5, 0.1), pull + 1.5 * push, rtol=1e-5, atol=1e-5)
    apart = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert float(steering_loss(apart, torch.tensor([0, 0, 1]), 1.5, 0.4)) == pytest.approx(0, abs=1e-6)


def test_steering_rises_over_the_first_epochs_of_the_first_task() -> None:
    learner = started("rsiat", warmup_epochs=2, batch_size=5)
    batch, method = prepared(learner, 0)[1], rsiat(learner)
    f = method.final(method.features(batch.images))
    weight = method.heads.tasks[-1].get_parameter("weight")
    plain = F.cross_entropy(cosface_logits(cosines(f, weight), batch.labels, 50.0, 0.2), batch.labels)
    steering = steering_loss(f, batch.labels, 1.5, 0.4)
    assert len(batch.labels) == 12 and method.epoch_steps == 3
    for step, share in ((0, 0.0), (2, 0.0), (3, 0.5), (5, 0.5), (6, 1.0), (60, 1.0)):
        method.step = step
        assert_close(method.loss(batch), plain + 0.5 * share * steering)


def test_later_tasks_are_held_by_the_projected_features_of_the_model_before() -> None:
    learner = started("rsiat", 1, learning_rate=0.05)
    images = next(loader_of(learner, TASKS[1])()).images
    old = learner.method.extract(images)[:, :WIDTH].detach()
    prototypes = rsiat(learner).gaussians.mean.clone()
    prepared(learner, 1)
    method = rsiat(learner)
    with torch.no_grad():
        for parameter in method.beside_mlp[1].update.parameters():
            parameter.add_(0.1)
    batch = next(loader_of(learner, TASKS[1])())
    f = method.final(method.features(batch.images))
    assert float((f - old).detach().abs().max()) > 1e-2, "the adapter has moved"
    projected = method.projector(old)
    overlap = cosines(method.projector(prototypes), projected).mean()
    weight = method.heads.tasks[-1].get_parameter("weight")
    expected = F.cross_entropy(cosface_logits(cosines(f, weight), batch.labels, 50.0, 0.2), batch.labels)
    expected = expected + 3.0 * (f - projected).square().mean() + 1.5 * overlap
    assert_close(method.loss(batch), expected, rtol=1e-4, atol=1e-4)
    method.loss(batch).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.projector.parameters())


def test_the_projector_learns_from_the_second_task_on_at_its_own_rate() -> None:
    learner = started("rsiat")
    method, _ = prepared(learner, 0)
    assert [group["lr"] for group in method.parameter_groups()] == [5e-3, 2e-2]
    learner = started("rsiat", 1)
    method, _ = prepared(learner, 1)
    *_, last = method.parameter_groups()
    assert (last["lr"], last["weight_decay"]) == (1.7e-4, 4.1e-3)
    assert {id(p) for p in last["params"]} == {id(p) for p in rsiat(learner).projector.parameters()}


@both
def test_the_first_task_may_have_epochs_of_its_own(name: str) -> None:
    assert METHODS[name].config().first_epochs is None
    short, long = (started(name, 2, epochs=1, first_epochs=n, refit_epochs=0) for n in (1, 3))
    assert not torch.equal(
        short.method.state()["heads.tasks.0.weight"], long.method.state()["heads.tasks.0.weight"]
    )
    same = started(name, 2, epochs=1, refit_epochs=0)
    for key, x in same.method.state().items():
        assert torch.equal(x, short.method.state()[key]), key
