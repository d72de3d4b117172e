"""SLDC: distillation, rows that follow the drift, and heads refitted on them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from refit_tools import TASKS, loader_of, prepared, sldc, started, state_of
from small_tasks import Patterns, new_learner, small_config, unseen
from tiny import WIDTH
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from duallora.methods import TaskInfo
from duallora.methods import sldc as sldc_module
from duallora.methods.drift import linear_map, ridge_map, weakly_nonlinear_map
from duallora.methods.sldc import symmetric_cross_entropy

# -- SLDC ----------------------------------------------------------------------------------------------------


def test_symmetric_cross_entropy_as_written() -> None:
    logits = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p, one_hot = logits.softmax(1), F.one_hot(labels, 4).float().clamp(min=1e-4)
    reverse = -(p * one_hot.log()).sum(1).mean()
    expected = F.cross_entropy(logits, labels) / 2 + reverse / 2
    assert_close(symmetric_cross_entropy(logits, labels), expected)


def test_no_distillation_in_the_first_task() -> None:
    method, batch = prepared(started("sldc"), 0)
    expected = symmetric_cross_entropy(method.heads.current(method.features(batch.images)), batch.labels)
    assert torch.equal(method.loss(batch), expected)


@pytest.mark.parametrize(("gamma_kd", "gamma_norm"), [(1.0, 0.1), (0.0, 3.0), (2.0, 0.0)])
def test_features_are_held_where_the_model_before_the_task_had_them(
    gamma_kd: float, gamma_norm: float
) -> None:
    learner = started("sldc", 1, gamma_kd=gamma_kd, gamma_norm=gamma_norm)
    images = next(loader_of(learner, TASKS[1])()).images
    old = learner.method.extract(images)[:, :WIDTH]
    method, batch = prepared(learner, 1)
    with torch.no_grad():
        assert_close(method.features(images)[:, :WIDTH], old, rtol=0, atol=1e-4)
        for parameter in method.adapters.parameters():
            parameter.add_(0.1)
    new = method.features(images)[:, :WIDTH]
    assert float((new - old).detach().abs().max()) > 1e-2
    plain = symmetric_cross_entropy(method.heads.current(new), batch.labels)
    square = (new - old).square().sum() / new.numel()
    norms = (new.norm(dim=1) - old.norm(dim=1)).square().sum() / len(new)
    loss = method.loss(batch)
    assert_close(loss, plain + gamma_kd * square + gamma_norm * norms)
    expected = torch.autograd.grad(
        plain + gamma_kd * square + gamma_norm * norms, list(method.adapters.parameters())
    )
    for module in (method.adapters, method.heads):
        module.zero_grad()  # the last step of the first task left some
    loss.backward()
    for parameter, gradient in zip(method.adapters.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert method.heads.tasks[0].get_parameter("weight").grad is None


def rows_before_and_after(
    drift: str, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Learns task 1 after task 0; the states after and before, and features of task 1 before and after."""
    learner = started("sldc", 1, drift=drift, learning_rate=0.05, epochs=3, **changes)
    before, images = state_of(learner), next(loader_of(learner, TASKS[1])()).images
    x = learner.method.extract(images)
    learner.learn(TASKS[1])
    return state_of(learner), before, x, learner.method.extract(images)


def test_old_rows_follow_the_linear_drift() -> None:
    after, before, x, y = rows_before_and_after("linear")
    m = linear_map(x[:, :WIDTH], y[:, :WIDTH], 1.0).matrix.double()
    assert float((m - torch.eye(WIDTH)).abs().max()) > 1e-2
    near = {"rtol": 1e-3, "atol": 1e-3}
    # What else the rows read follows a ridge regression of its own.
    u, v = x[:, WIDTH:].double(), y[:, WIDTH:].double()
    width = 3 * WIDTH
    eye = torch.eye(width, dtype=torch.float64)
    beside = eye + torch.linalg.inv(u.T @ u + 0.01 * u.square().sum() / width * eye) @ u.T @ (v - u)
    whole = torch.block_diag(m, beside)
    assert_close(after["rows.mean"][:2], before["rows.mean"] @ whole, **near)
    assert float((beside - eye)[:, :WIDTH].abs().max()) > 1e-2, "the mean patch token above the adapters"
    assert torch.equal(after["rows.mean"][:2, 2 * WIDTH :], before["rows.mean"][:, 2 * WIDTH :])
    assert_close(after["gaussians.mean"][:2].double(), before["gaussians.mean"].double() @ m, **near)
    moved = m.T @ before["gaussians.covariance"].double() @ m
    assert_close(after["gaussians.covariance"][:2].double(), moved, **near)
    own = after["rows.scatter"] - whole.T @ before["rows.scatter"] @ whole
    labels = torch.tensor(TASKS[1].targets)
    centred = torch.cat([y[labels == k] - y[labels == k].mean(0) for k in range(3)]).double()
    assert_close(own, centred.T @ centred, rtol=1e-2, atol=1e-2)


def test_the_rows_of_both_columns_stay_together() -> None:
    for drift in ("nonlinear", "penalised", "linear", "none"):
        state = rows_before_and_after(drift)[0]
        final = state["rows.mean"][:, :WIDTH].float()
        assert_close(final, state["gaussians.mean"], rtol=1e-4, atol=1e-4)
        weighted = (state["rows.count"] - 1)[:, None, None] * state["gaussians.covariance"]
        if drift in ("linear", "none"):  # elsewhere the pooled scatter moves by one Jacobian for all rows
            scatter = state["rows.scatter"][:WIDTH, :WIDTH]
            assert_close(weighted.sum(0), scatter, rtol=1e-3, atol=1e-2)


def test_rows_stay_without_compensation() -> None:
    after, before, x, y = rows_before_and_after("none")
    assert float((x - y)[:, :WIDTH].abs().max()) > 1e-2, "the features did drift"
    assert torch.equal(after["rows.mean"][:2], before["rows.mean"])
    assert torch.equal(after["gaussians.covariance"][:2], before["gaussians.covariance"])


def test_the_nonlinear_map_moves_rows() -> None:
    after, before, x, y = rows_before_and_after("nonlinear", drift_steps=200)
    old, new = before["gaussians.mean"], after["gaussians.mean"][:2]
    assert float((new - old).norm()) > 0.05 * float((x - y)[:, :WIDTH].norm(dim=1).mean())
    assert torch.equal(after["gaussians.covariance"], after["gaussians.covariance"].mT)


@pytest.mark.parametrize(("drift", "penalty"), [("nonlinear", 0.0), ("penalised", 0.5)])
def test_the_released_map_has_no_penalty(drift: Any, penalty: float) -> None:
    learner = started("sldc", 1, drift=drift, drift_steps=40)
    x = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0))
    found = sldc(learner)._drift(TaskInfo(1, "now", ("cat", "dog")), x, x.flip(1))
    draws = learner.method.generator(1, "drift")
    expected = weakly_nonlinear_map(x, x.flip(1), 40, draws, penalty)
    assert torch.equal(found(x), expected(x))


class Bent(nn.Module):
    """``x + sin(x) / 2``, whose Jacobian is diagonal and another one at every point."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.sin() / 2


def test_covariances_follow_the_jacobian_at_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = started("sldc", 1)
    learner.learn(Patterns(["cat", "dog"], [2, 17]))  # larger classes weigh more in the pooled covariance
    method, before = sldc(learner), state_of(learner)
    given: list[Tensor] = []
    monkeypatch.setattr(method, "_drift", lambda _, *features: given.extend(features) or Bent())
    x = learner.method.extract(next(loader_of(learner, TASKS[0])()).images)
    y = x.clone()
    y[:, WIDTH : 2 * WIDTH] *= 1.5
    method._follow(TaskInfo(1, "now", ("cat", "dog")), x, y)
    assert [part.shape for part in given] == [(len(x), WIDTH)] * 2, "SLDC's own map is of the final feature"
    final = before["rows.mean"][:, :WIDTH].float()
    mean, slope = final, 1 + final.cos() / 2
    moved = before["gaussians.covariance"] * slope[:, :, None] * slope[:, None, :]
    assert_close(method.gaussians.mean, mean + mean.sin() / 2)
    assert_close(method.gaussians.covariance, moved, rtol=1e-4, atol=1e-5)
    moments = method.rows.moments
    assert_close(moments.mean[:, :WIDTH].float(), mean + mean.sin() / 2)
    assert torch.equal(moments.mean[:, 2 * WIDTH :], before["rows.mean"][:, 2 * WIDTH :])
    beside = ridge_map(x[:, WIDTH:], y[:, WIDTH:])
    assert float((beside - torch.eye(3 * WIDTH)).abs().max()) > 0.02
    assert_close(moments.mean[:, WIDTH:], before["rows.mean"][:, WIDTH:] @ beside)
    share = (before["rows.count"] / before["rows.count"].sum())[:, None]
    pooled = (slope.double() * share).sum(0)
    m = torch.block_diag(pooled.diag(), beside)
    assert_close(moments.scatter, m.T @ before["rows.scatter"] @ m, rtol=1e-4, atol=1e-4)


def test_rows_that_read_the_final_feature_alone_follow_it() -> None:
    """A ViT of one layer that pools its patches has nothing beside the final feature."""
    config = small_config("sldc", first_adapted_layer=0, drift="linear", learning_rate=0.05)
    learner = new_learner(config, depth=1, global_pool="avg")
    learner.method.context = replace(learner.method.context, autocast=nullcontext)
    learner.learn(TASKS[0])
    before, images = state_of(learner), next(loader_of(learner, TASKS[1])()).images
    x = learner.method.extract(images)
    assert x.shape[1] == learner.backbone.row_dim == WIDTH
    learner.learn(TASKS[1])
    m = linear_map(x, learner.method.extract(images), 1.0).matrix.double()
    after = learner.method.state()
    assert_close(after["rows.mean"][:2], before["rows.mean"] @ m, rtol=1e-3, atol=1e-3)
    assert not torch.equal(after["rows.mean"][:2], before["rows.mean"])


def test_a_single_class_moves_nothing_and_gets_a_head() -> None:
    learner = started("sldc", 2, samples=64, refit_learning_rate=0.02)
    before = state_of(learner)
    alone = Patterns(["yak"], 10, 7)
    learner.learn(alone)
    after = learner.method.state()
    for name, x in before.items():
        if name.startswith(("adapters", "rows.mean", "gaussians.mean")):
            assert torch.equal(after[name][: len(x)], x), name
    assert not torch.equal(after["heads.tasks.0.weight"], before["heads.tasks.0.weight"])
    found = learner.evaluate(Patterns(["yak", *TASKS[1].classes], 10, 8))
    assert found.tasks[2].accuracy is not None and found.tasks[2].accuracy > 0.5
    assert found.accuracy > 0.5


def test_what_a_task_needs_is_gone_after_it() -> None:
    learner = started("sldc", 1)
    method = sldc(prepared(learner, 1)[0] and learner)
    assert method._start is not None and len(method._teacher) == 1
    learner = started("sldc", 2)
    assert sldc(learner)._start is None and not sldc(learner)._teacher


def test_the_heads_are_refitted_on_moved_samples() -> None:
    kept, refitted = started("sldc", 2, refit_epochs=0), started("sldc", 2)
    for name, x in kept.method.state().items():
        same = torch.equal(refitted.method.state()[name], x)
        assert same != name.startswith("heads"), name
    data = unseen(TASKS[:2], 8)
    better = started("sldc", 2, samples=64, refit_epochs=6, refit_learning_rate=2e-2)
    assert better.evaluate(data).accuracy > kept.evaluate(data).accuracy


def test_a_refit_has_the_released_floor_batch_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(sldc_module, "refit", lambda *parts, **more: given.append((parts, more)))
    learner = started("sldc", 2, refit_learning_rate=0.004)
    (_, mean, factors, loss, optimizer, _, _, batch_size, _), more = given[-1]
    model = sldc(learner).gaussians
    assert torch.equal(mean, model.mean) and loss is symmetric_cross_entropy
    floor = 1e-5 * model.covariance.diagonal(dim1=1, dim2=2).amax(1)
    floor = floor.clamp(min=1e-3)[:, None, None] * torch.eye(WIDTH)
    assert_close(factors @ factors.mT, model.covariance + floor, rtol=1e-4, atol=1e-4)
    assert batch_size // len(mean) == 32 * len(mean) // 10 // len(mean) == 3, "3.2 a class there"
    adam = optimizer([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert (adam["lr"], adam["weight_decay"]) == (0.004, 1e-4)
    assert more == {"end": 0.1}
