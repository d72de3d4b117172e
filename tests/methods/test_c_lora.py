"""C-LoRA: what the routing matrix adds up to, what stays frozen, what is penalised and at which rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_same_state, new_learner, small_config, three_tasks
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner
from duallora.methods import Batch
from duallora.methods.c_lora import RoutedLoRA

DEPTH, RANK = 3, 4
STATE = ("a", "b", "r_old", "r_delta")


def fresh(**changes: Any) -> tuple[ContinualLearner, RoutedLoRA]:
    learner = new_learner(small_config("c-lora", **changes), depth=DEPTH)
    assert isinstance(learner.method, RoutedLoRA)
    return learner, learner.method


def fill(method: RoutedLoRA) -> None:
    """Random values in place of everything that starts as zero or the identity."""
    generator = torch.Generator().manual_seed(1)
    for update in method.updates:
        for name in STATE[1:]:
            getattr(update, name).data.normal_(std=0.3, generator=generator)


def in_training(method: RoutedLoRA, note: Callable[[], None]) -> None:
    """Calls ``note`` after every optimiser step."""
    step = method.after_step
    method.after_step = lambda: (step(), note())[0]  # type: ignore[method-assign]


def batch_of(learner: ContinualLearner, data: Patterns) -> Batch:
    images = torch.stack([learner.preprocess(image) for image in data.images])
    return Batch(images, torch.tensor(data.targets), torch.arange(len(data)))


def test_the_projection_is_the_formula() -> None:
    _, method = fresh(projections="qv")
    fill(method)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    for wrapper, update in zip(method.beside.values(), method.updates, strict=True):
        plain = x.double() @ wrapper.base.weight.double().T + wrapper.base.bias.double()
        route = (update.r_old + update.r_delta).double()
        extra = x.double() @ update.a.double() @ route @ update.b.double()
        plain[..., :32] += extra[..., :32]
        plain[..., 64:] += extra[..., 32:]
        torch.testing.assert_close(wrapper(x).double(), plain, rtol=1e-5, atol=1e-5)
        wrapper.merge()
        torch.testing.assert_close(wrapper(x).double(), plain, rtol=1e-5, atol=1e-5)


def test_the_routing_starts_as_the_identity_and_the_update_as_zero() -> None:
    _, method = fresh()
    for update in method.updates:
        assert torch.equal(update.r_old, torch.eye(RANK)) and not update.r_delta.any()
        assert update.a.any() and not update.delta_weight().any()
        assert not isinstance(update.r_old, torch.nn.Parameter)


def test_the_old_routing_stays_in_training_and_grows_by_the_difference() -> None:
    learner, method = fresh()
    seen: list[list[dict[str, Tensor]]] = []
    in_training(
        method,
        lambda: seen.append([{n: getattr(u, n).detach().clone() for n in STATE} for u in method.updates]),
    )
    total = [torch.eye(RANK) for _ in method.updates]
    for task in three_tasks():
        seen.clear()
        before = [update.r_old for update in method.updates]
        learner.learn(task)
        assert len(seen) >= 2
        for i, update in enumerate(method.updates):
            for step in seen:
                assert torch.equal(step[i]["r_old"], total[i]), "R_old moved while R_delta was trained"
            last = seen[-1][i]
            assert last["r_delta"].abs().max() > 0
            total[i] = total[i] + last["r_delta"]
            assert update.r_old is before[i] and torch.equal(update.r_old, total[i])
            assert not update.r_delta.any()
            # Absorbing changes where R is kept, not R: the update is the one that was trained.
            assert torch.equal(update.a, last["a"]) and torch.equal(update.b, last["b"])
            torch.testing.assert_close(update.delta_weight(), last["a"] @ total[i] @ last["b"])


def test_the_penalty_is_the_formula() -> None:
    learner, method = fresh(orthogonality=0.7)
    learner.learn(three_tasks()[0])
    fill(method)
    batch = batch_of(learner, three_tasks()[0])
    for wrapper in method.beside.values():
        wrapper.separate()
    features = method.features(batch.images)[:, :WIDTH]
    entropy = F.cross_entropy(method.heads.tasks[-1](features), batch.labels)
    expected = 0.0
    for update in method.updates:
        old, delta = update.r_old, update.r_delta
        for i in range(RANK):
            for j in range(RANK):
                expected += float(old[:, i] @ delta[:, j].detach()) ** 2
                expected += float(old[i, :] @ delta[j, :].detach()) ** 2
    assert expected > 1
    method.later = False
    torch.testing.assert_close(method.loss(batch), entropy)
    method.later = True
    torch.testing.assert_close(
        float((method.loss(batch) - entropy).detach()), 0.7 * expected, rtol=1e-4, atol=1e-4
    )


def test_without_earlier_tasks_the_penalty_is_on_the_size_of_the_difference() -> None:
    _, method = fresh()
    update = method.updates[0]
    update.r_delta.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(update.overlap(), 2 * update.r_delta.square().sum())


def test_the_penalty_begins_with_the_second_task() -> None:
    tasks = three_tasks()
    (free, _), (held, _) = fresh(orthogonality=0.0), fresh(orthogonality=1e3)
    for learner in (free, held):
        learner.learn(tasks[0])
    assert_same_state(held, free)
    moved = {}
    for learner in (free, held):
        old = [update.r_old.clone() for update in learner.method.updates]
        learner.learn(tasks[1])
        moved[learner] = sum(
            float((u.r_old - o).square().sum()) for u, o in zip(learner.method.updates, old, strict=True)
        )
    assert 0 < moved[held] < moved[free] / 2


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_the_pair_is_slow_after_the_first_task_that_was_trained(share: float) -> None:
    learner, method = fresh(shared_rate=share)
    latest: dict[int, float] = {}
    groups = method.parameter_groups

    def noted() -> list[dict[str, Any]]:
        found = groups()
        latest.clear()
        latest.update({id(p): group["lr"] for group in found for p in group["params"]})
        assert sum(len(group["params"]) for group in found) == len(latest)
        return found

    method.parameter_groups = noted  # type: ignore[method-assign]
    full = learner.config.learning_rate
    # A single class is not trained, so the pair is still to be learned after it.
    learner.learn(Patterns(["yak"], 4))
    for task, pair in zip(three_tasks(), (full, full * share, full * share), strict=True):
        before = [update.a.detach().clone() for update in method.updates]
        learner.learn(task)
        assert len(latest) == 2 + 3 * len(method.updates)
        for update in method.updates:
            assert latest[id(update.r_delta)] == full
            assert latest[id(update.a)] == latest[id(update.b)] == pair
    if not share:
        assert all(torch.equal(u.a, b) for u, b in zip(method.updates, before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    backbone = tiny_backbone(family)
    bare = backbone(tiny_images())
    learner = ContinualLearner(backbone, small_config("c-lora"), device="cpu")
    assert isinstance(learner.method, RoutedLoRA)
    torch.testing.assert_close(learner.method.extract(tiny_images()), bare)
    fill(learner.method)
    assert (learner.method.extract(tiny_images()) - bare).abs().max() > 1e-3
