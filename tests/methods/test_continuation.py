"""A known domain's next task: what its training pays for moves, and rows that follow them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from duallora_tools import judge
from small_tasks import Patterns, new_learner, small_config

from duallora import ContinualLearner
from duallora.adapters.dual_lora import DualAdapter
from duallora.adapters.dynamic_memory import DynamicMemory
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.methods.continuation import Continuation

DEPTH, WIDTH, DIM = 3, 4, 6
CPU = torch.device("cpu")


def task_of(*names: str, seed: int) -> Patterns:
    """Two classes of one domain, whatever they are called."""
    found = Patterns(["ant", "bee"], 8, seed)
    found.classes = list(names)
    return found


@pytest.fixture(autouse=True)
def adapters_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain keeps its adapters."""
    judge(monkeypatch, helps=True)


@pytest.fixture(scope="module")
def tasks() -> list[Patterns]:
    """Two of one domain, then one of another."""
    return [task_of("ant", "bee", seed=0), task_of("cat", "dog", seed=1), Patterns(["gnu", "hen"], 8, 5)]


def learner_of(tasks: list[Patterns], **fields: Any) -> ContinualLearner:
    learner = new_learner(small_config(residual="own", **({"known_domain": 0.25} | fields)), depth=DEPTH)
    for task in tasks:
        learner.learn(task)
    return learner


def adapters(learner: ContinualLearner) -> Iterator[DualAdapter]:
    for module in learner.method.adapted.values():  # type: ignore[attr-defined]
        yield from module.groups.values()


def residual(learner: ContinualLearner, task: int) -> list[torch.Tensor]:
    """Psi and C of a task's adapter at all places."""
    parts = [part for group in adapters(learner) for part in group.residuals if part.task == task]
    return [tensor.clone() for part in parts for tensor in (part.psi, part.c)]


def rows_of(*means: float) -> ClassStatistics:
    """One class a task with these means in every dimension, fifty images each."""
    rows, draw = ClassStatistics(DIM, CPU), torch.Generator().manual_seed(0)
    for task, mean in enumerate(means):
        images = mean + torch.randn(50, DIM, generator=draw)
        rows.replace(task, ClassMoments.of(images, torch.zeros(50, dtype=torch.long), 1))
        rows.fit_temperature(task, images, torch.zeros(50, dtype=torch.long))
    return rows


def test_only_what_adapters_move_is_paid_for_in_standard_deviations() -> None:
    rows = rows_of(0.0)
    before = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))
    found = Continuation.of(rows, before, WIDTH)
    assert torch.allclose(found.spread, torch.ones(WIDTH), atol=0.3)
    assert float(found.moved(before, before)) == 0
    early = before.clone()
    early[:, WIDTH:] += 7
    assert float(found.moved(before, early)) == 0
    one, two = before.clone(), before.clone()
    one[:, 0] += found.spread[0]
    two[:, 1] += 2 * found.spread[1]
    assert float(found.moved(before, one)) > 0
    assert float(found.moved(before, two)) == pytest.approx(4 * float(found.moved(before, one)), rel=1e-5)


def test_rows_of_the_domain_follow_and_others_stay() -> None:
    rows = rows_of(0.0, 3.0, -1.0)
    before = torch.randn(60, DIM, generator=torch.Generator().manual_seed(2)) - 1
    means, scatter = rows.moments.mean.clone(), rows.moments.scatter.clone()
    shift = torch.tensor([0.5, 0.0, -2.0, 1.0, 0.0, 0.0])
    Continuation.of(rows, before, WIDTH).follow(rows, before + shift, [0])
    assert torch.allclose(rows.moments.mean[0], means[0] + shift, atol=1e-5)
    assert torch.equal(rows.moments.mean[1:], means[1:])
    assert torch.allclose(rows.moments.scatter, scatter, rtol=1e-5)  # a shift alone spreads nothing


@pytest.mark.parametrize(("tasks", "share"), [([0], 0.5), ([0, 1], 1.0)])
def test_the_common_scatter_moves_by_the_share_that_the_rows_have_in_it(
    tasks: list[int], share: float
) -> None:
    rows = rows_of(0.0, 3.0, -1.0)
    before = 5 * torch.randn(4000, DIM, generator=torch.Generator().manual_seed(2))
    after = before.clone()
    after[:, 0] *= 1.4  # the ridge takes half of what is found in directions of average spread
    spread = float(rows.moments.scatter[0, 0])
    Continuation.of(rows, before, WIDTH).follow(rows, after, tasks)
    assert float(rows.moments.scatter[0, 0]) == pytest.approx(spread * (1 + 0.2 * share) ** 2, rel=0.02)


def test_features_that_stay_leave_rows_exactly_where_they_are() -> None:
    rows = rows_of(0.0, 3.0)
    means, scatter = rows.moments.mean.clone(), rows.moments.scatter.clone()
    before = torch.randn(60, DIM, generator=torch.Generator().manual_seed(2))
    Continuation.of(rows, before, WIDTH).follow(rows, before.clone(), [0])
    assert torch.equal(rows.moments.mean, means) and torch.equal(rows.moments.scatter, scatter)


@pytest.fixture
def two_domains(tasks: list[Patterns], monkeypatch: pytest.MonkeyPatch) -> ContinualLearner:
    """Has learned one task of each; the next one is of the first."""

    def join(self: DynamicMemory, task: int, *_: Any) -> None:
        self.domains.note([0, 1, 0][: task + 1])

    monkeypatch.setattr(DynamicMemory, "join", join)
    return learner_of([tasks[0], tasks[2]])


def test_the_adapter_of_a_known_domain_goes_on_and_another_ones_stays(
    two_domains: ContinualLearner, tasks: list[Patterns]
) -> None:
    learner = two_domains
    own, other = residual(learner, 0), residual(learner, 1)
    learner.learn(tasks[1])
    assert all(not torch.equal(a, b) for a, b in zip(own, residual(learner, 0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other, residual(learner, 1), strict=True))


def test_rows_follow_where_the_adapter_goes_on_and_nowhere_else(
    two_domains: ContinualLearner, tasks: list[Patterns]
) -> None:
    learner = two_domains
    before = learner.method.rows.moments.mean.clone()
    learner.learn(tasks[1])
    after, of = learner.method.rows.moments.mean, learner.method.rows.task
    width = 2 * learner.method.backbone.dim
    assert not torch.equal(after[of == 0][:, :width], before[:2, :width])
    assert torch.equal(after[of == 0][:, width:], before[:2, width:])  # read below the adapters
    assert torch.equal(after[of == 1], before[2:])


def test_heads_of_the_domain_are_the_classifiers_of_their_rows(tasks: list[Patterns]) -> None:
    learner = learner_of(tasks[:2])
    for task, head in enumerate(learner.method.heads.tasks):
        weight, bias = learner.method.rows.linear(task)
        assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias)


def test_a_single_class_of_a_known_domain_trains_nothing(tasks: list[Patterns]) -> None:
    learner = learner_of(tasks[:1], known_domain=0.0)
    before, means = residual(learner, 0), learner.method.rows.moments.mean.clone()
    learner.learn(Patterns(["cow"], 8, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, residual(learner, 0), strict=True))
    assert torch.equal(learner.method.rows.moments.mean[:2], means)


def test_the_loss_compares_with_the_model_as_the_last_task_left_it(
    tasks: list[Patterns], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step nothing has moved; later the old features are still those of the saved adapter."""
    learner = learner_of(tasks[:1])
    images = torch.stack([learner.preprocess(image) for image, _ in tasks[1]])
    with torch.no_grad():
        known = learner.method.extract(images)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    moved = Continuation.moved

    def noted(self: Continuation, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        seen.append((before.detach().clone(), now.detach().clone()))
        return moved(self, before, now)

    monkeypatch.setattr(Continuation, "moved", noted)
    learner.learn(tasks[1])
    assert torch.equal(*seen[0])
    assert not torch.equal(*seen[-1])
    with torch.no_grad():
        assert not torch.allclose(learner.method.extract(images), known, atol=1e-6)


def test_an_adapter_that_is_opened_again_begins_where_it_ended() -> None:
    draw = torch.Generator().manual_seed(0)
    adapter = DualAdapter(8, 16)
    for task in range(2):
        adapter.simulate(task, torch.randn(8, 2, generator=draw), torch.randn(8, 3, generator=draw), draw)
    x, weights = torch.randn(4, 5, 8, generator=draw), torch.rand(4, 2, generator=draw)

    def product() -> torch.Tensor:
        found = adapter.residual_product(x, weights, selected=4)
        assert found is not None
        return (found[0] @ found[1]).detach()

    finished = product()
    adapter.resume(0, moves=True)
    assert torch.allclose(product(), finished, atol=1e-6)
    assert adapter.psi is not None and adapter.c is not None
    with torch.no_grad():
        adapter.psi += 1
        adapter.c += 1
    assert not torch.allclose(product(), finished, atol=1e-2)
    with adapter.as_before():
        assert torch.equal(product(), finished)
    opened = product()
    adapter.merge()
    assert torch.allclose(product(), opened, atol=1e-6)
    assert [part.task for part in adapter.residuals] == [0, 1]
