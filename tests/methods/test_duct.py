"""DUCT: merged changes of the backbone, a refitted newest head, and old heads that take a share of it."""

from __future__ import annotations

import pytest
import torch
from refit_tools import TASKS, loader_of, prepared, started, state_of
from tiny import WIDTH, tiny_backbone
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from duallora import ContinualLearner
from duallora.classifiers.transport import transport_plan
from duallora.methods import TaskInfo
from duallora.methods.duct import DUCT, class_means


def duct(learner: ContinualLearner) -> DUCT:
    assert isinstance(learner.method, DUCT)
    return learner.method


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (5, 2)])
def test_a_plan_uses_rows_and_columns_alike(rows: int, columns: int) -> None:
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = transport_plan(cost, 0.1)
    assert_close(plan.sum(1), torch.ones(rows, dtype=torch.float64))
    assert_close(
        plan.sum(0), torch.full((columns,), rows / columns, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    # Of Gibbs's form: cost + entropy log P is a sum of a row's and a column's number.
    form = cost + 0.1 * plan.log()
    form = form - form[:1] - form[:, :1] + form[:1, :1]
    assert float(form.abs().max()) < 1e-6


def test_little_entropy_is_an_assignment_whatever_the_distances() -> None:
    cost = 40 * torch.tensor([[0.0, 2, 1], [2, 0, 1.5], [1, 2, 0.5]], dtype=torch.float64)
    assert float((-cost / 0.02).exp().count_nonzero()) == 2, "its kernel is all but zero"
    assert_close(transport_plan(cost, 0.02), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-2)


def test_every_task_starts_from_the_pre_trained_backbone() -> None:
    learner = started("duct", 1)
    original = dict(tiny_backbone().named_parameters())
    merged = state_of(learner)
    prepared(learner, 1)
    for name, parameter in original.items():
        key = f"adapters.backbone.{name.replace('.', '/')}"
        assert torch.equal(learner.method.state()[key], parameter)
        assert not torch.equal(merged[key], parameter), "the first task left its change"


def test_a_task_adds_a_share_of_its_change_by_how_alike_its_classes_stay() -> None:
    learner = started("duct", 1, merge=0.5)
    before = {name: p.detach().clone() for name, p in duct(learner).copy.items()}
    method, batch = prepared(learner, 1)
    assert isinstance(method, DUCT)
    own = method.copy.originals(method.backbone)
    with torch.no_grad():
        for parameter in method.copy.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trained = [p.detach().clone() for p in method.copy.values()]
    means = [
        class_means(f[:, :WIDTH], batch.labels, 3)
        for f in (method.features(batch.images).detach(), method.frozen_features(batch.images))
    ]
    share = 0.5 * float(F.cosine_similarity(*means).mean())
    assert 0 < share < 0.5
    method.consolidate(TaskInfo(1, "now", tuple(TASKS[1].classes)), loader_of(learner, TASKS[1]))
    for old, new, start, found in zip(before.values(), trained, own, method.copy.values(), strict=True):
        assert_close(found.detach(), old + share * (new - start))


def test_old_heads_take_a_share_of_the_newest_one() -> None:
    plain, learner = (started("duct", 2, head_merge=share, entropy=1.0) for share in (0.0, 0.4))
    old, new = (head.get_parameter("weight").detach() for head in plain.method.heads.tasks)
    mean = duct(learner).prototypes.mean
    plan = transport_plan(torch.cdist(mean[:2].double(), mean[2:].double()), 1.0).float()
    expected = 0.6 * F.normalize(old) + 0.4 * plan @ F.normalize(new)
    assert_close(learner.method.heads.tasks[0].get_parameter("weight").detach(), expected)
    assert torch.equal(learner.method.heads.tasks[1].get_parameter("weight"), new)


def test_prototypes_are_of_the_bare_backbone() -> None:
    learner = started("duct", 2)
    backbone = tiny_backbone()
    expected: list[Tensor] = []
    for task in TASKS[:2]:
        batch = next(loader_of(learner, task)())
        expected.append(class_means(backbone(batch.images)[:, :WIDTH], batch.labels, len(task.classes)))
    assert_close(duct(learner).prototypes.mean, torch.cat(expected))


def test_the_newest_head_is_trained_again_on_the_merged_backbone() -> None:
    weights = [
        started("duct", 1, refit_epochs=n, refit_learning_rate=0.1).method.state()["heads.tasks.0.weight"]
        for n in (0, 8)
    ]
    assert float((weights[0] - weights[1]).abs().max()) > 1e-3


def test_the_size_of_its_batches_may_be_left_to_the_machine() -> None:
    whole, auto = (started("duct", 1, batch_size=size).method.state() for size in (32, "auto"))
    assert all(torch.equal(auto[key], x) for key, x in whole.items())
