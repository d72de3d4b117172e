"""Gaussians of rows, heads refitted on them, and maps from features before a task to those after it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from duallora.classifiers.alignment import Gaussians, refit
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.heads import Heads
from duallora.methods.drift import Linear, WeaklyNonlinear, linear_map, weakly_nonlinear_map

DIM, CPU = 6, torch.device("cpu")
adam = partial(torch.optim.Adam, lr=1e-2)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(classes: int = 3, each: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, d) of classes with different means and covariances, and labels (n,)."""
    generator, labels = random(seed), torch.arange(classes).repeat_interleave(each)
    shapes = torch.randn(classes, DIM, DIM, generator=generator)
    noise = torch.randn(classes * each, 1, DIM, generator=generator)
    means = 4 * torch.randn(classes, DIM, generator=generator)
    return means[labels] + (noise @ shapes[labels])[:, 0], labels


def heads_of(*sizes: int) -> Heads:
    heads = Heads(DIM, CPU)
    for task, size in enumerate(sizes):
        heads.open(size, random(task))
    return heads


def test_every_row_has_its_own_covariance() -> None:
    features, labels = images()
    model = Gaussians(DIM)
    model.add(features, labels, 3)
    model.add(features[:21] + 1, labels[:21], 2)
    assert model.covariance.shape == (5, DIM, DIM) and model.covariance.dtype == torch.float32
    for row, own in enumerate([*features.split(20), features[:20] + 1]):
        near = partial(assert_close, rtol=1e-4, atol=1e-4)
        near(model.mean[row], own.mean(0))
        near(model.covariance[row], torch.cov(own.T))
    assert_close(model.mean[4], features[20] + 1)
    assert not model.covariance[4].any(), "one image says nothing of the spread"
    other = Gaussians(DIM)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.covariance, model.covariance) and torch.equal(other.mean, model.mean)


def test_trained_heads_are_kept_beside_the_refitted_ones() -> None:
    model, heads = Gaussians(DIM), heads_of(2, 3)
    for head in heads.tasks:
        model.keep(head)
    before = {name: x.clone() for name, x in heads.state_dict().items()}
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(1)
    model.restore(heads)
    assert all(torch.equal(x, before[name]) for name, x in heads.state_dict().items())
    model.mean, model.covariance = torch.zeros(5, DIM), torch.zeros(5, DIM, DIM)
    model.forget(torch.tensor([True, False, True, True, True]))
    other = Gaussians(DIM)
    other.load_state_dict(model.state_dict())
    assert torch.equal(
        other.weight[:2], torch.stack([before["tasks.0.weight"][0], before["tasks.1.weight"][0]])
    )
    assert len(other.bias) == 4


def test_factors_are_of_the_covariances_with_a_ridge() -> None:
    model = Gaussians(DIM)
    features, labels = images()
    model.add(features, labels, 3)
    model.add(features[:1], labels[:1], 1)
    factors = model.factors(0.5)
    assert_close(factors @ factors.mT, model.covariance + 0.5 * torch.eye(DIM), rtol=1e-4, atol=1e-4)
    assert_close(factors[3], math.sqrt(0.5) * torch.eye(DIM))


def test_a_covariance_that_rounding_made_indefinite_has_factors() -> None:
    model = Gaussians(DIM)
    vector = torch.randn(1, DIM, generator=random()) * 1e4
    model.mean, model.covariance = torch.zeros(1, DIM), (vector.T @ vector)[None]
    assert float(torch.linalg.eigvalsh(model.covariance.double()).min()) < -1e-4
    assert model.factors(1e-4).isfinite().all()


@pytest.mark.parametrize("each", [False, True])
def test_moved_samples_have_the_moved_moments(each: bool) -> None:
    """``x M`` for all x of a row gives ``mu M`` and ``M^T S M``; J is M^T, one or one a row."""
    features, labels = images()
    model = Gaussians(DIM)
    model.add(features, labels, 3)
    maps = (
        torch.randn(3, DIM, DIM, generator=random(1)) if each else torch.randn(DIM, DIM, generator=random(1))
    )
    moved = (features[:, None] @ (maps[labels] if each else maps))[:, 0]
    expected = Gaussians(DIM)
    expected.add(moved, labels, 3)
    model.move((model.mean[:, None] @ maps)[:, 0], maps.mT)
    assert_close(model.mean, expected.mean, rtol=1e-4, atol=1e-4)
    assert_close(model.covariance, expected.covariance, rtol=1e-4, atol=1e-3)
    assert torch.equal(model.covariance, model.covariance.mT)


def test_rows_of_the_memory_move_with_given_means() -> None:
    features, labels = images()
    memory = ClassStatistics(DIM, CPU)
    memory.replace(0, ClassMoments.of(features, labels, 3))
    drift, mean = torch.randn(DIM, DIM, generator=random(2)).double(), torch.randn(3, DIM).double()
    scatter, before = memory.moments.scatter.clone(), memory.moments.mean.clone()
    memory.move(drift, mean)
    assert torch.equal(memory.moments.mean, mean)
    assert_close(memory.moments.scatter, drift.T @ scatter @ drift)
    memory.move(drift)
    assert_close(memory.moments.mean, mean @ drift)
    assert not torch.allclose(before @ drift @ drift, mean @ drift)


def test_refitted_heads_tell_the_gaussians_apart() -> None:
    features, labels = images(5, 40)
    model = Gaussians(DIM)
    model.add(features, labels, 5)
    heads = heads_of(2, 3)
    before = heads(features).argmax(1)
    factors = model.factors(1e-2)
    refit(heads, model.mean, factors, F.cross_entropy, adam, 64, 20, 20, random())
    assert [len(head.get_parameter("bias")) for head in heads.tasks] == [2, 3]
    assert float((heads(features).argmax(1) == labels).float().mean()) > 0.9
    assert float((before == labels).float().mean()) < 0.6
    assert not heads(features).isnan().any()
    assert all(p.grad is None for p in heads.parameters())


def test_every_batch_holds_equal_shares_drawn_from_the_gaussians() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    heads = heads_of(2, 1)
    heads.requires_grad_(False)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append((logits.detach(), rows))
        return logits.sum() * 0  # the heads stay, so that logits say what was drawn

    weight = torch.cat([head.get_parameter("weight") for head in heads.tasks])
    mean = torch.arange(3.0)[:, None].expand(3, DIM) * 10
    factors = torch.eye(DIM).expand(3, DIM, DIM) * 0.1
    refit(heads, mean, factors, loss, adam, 500, 2, 100, random())
    assert len(seen) == 2 * (500 // 33)
    for _, rows in seen:
        assert rows.tolist() == [0] * 33 + [1] * 33 + [2] * 33
    logits, rows = torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])
    for row in range(3):
        own = logits[rows == row]
        assert_close(own.mean(0), mean[row] @ weight.T, rtol=0, atol=2e-2)
        assert_close(torch.cov(own.T), 0.01 * weight @ weight.T, rtol=0, atol=2e-3)
    assert not torch.equal(seen[0][0], seen[500 // 33][0]), "every epoch draws anew"


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_the_rate_of_a_refit_follows_a_cosine(end: float) -> None:
    rates: list[float] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step()

    model = Gaussians(DIM)
    model.add(*images(2), 2)
    refit(
        heads_of(2),
        model.mean,
        model.factors(1e-2),
        F.cross_entropy,
        partial(Noted, lr=0.1),
        8,
        5,
        2,
        random(),
        end,
    )
    cosine = [(1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert rates == pytest.approx([0.1 * (end + (1 - end) * share) for share in cosine])


def test_a_refit_of_no_epoch_changes_nothing() -> None:
    model, heads = Gaussians(DIM), heads_of(2)
    model.add(*images(2), 2)
    before = heads.tasks[0].get_parameter("weight").clone()
    refit(heads, model.mean, model.factors(1e-2), F.cross_entropy, adam, 8, 0, 2, random())
    assert torch.equal(heads.tasks[0].get_parameter("weight"), before)


def rotation(seed: int = 0) -> Tensor:
    turned: Tensor = torch.linalg.qr(torch.randn(DIM, DIM, generator=random(seed)))[0]
    return turned


def test_the_linear_map_finds_a_linear_drift() -> None:
    x = torch.randn(200, DIM, generator=random())
    turn = rotation()
    assert_close(linear_map(x, x @ turn, alpha=0).matrix, turn, rtol=0, atol=1e-4)
    # Norms have no part in the fit: every pair is compared at unit length.
    lengths = 10 * torch.rand(200, 1, generator=random(1)) + 0.1
    assert_close(linear_map(x * lengths, x @ turn, alpha=0).matrix, turn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 4, 60])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_few_images_leave_the_linear_map_near_the_identity(n: int, alpha: float) -> None:
    x = torch.randn(n, DIM, generator=random())
    y = x @ rotation() + 0.1 * torch.randn(n, DIM, generator=random(1))
    u, v = F.normalize(x.double()), F.normalize(y.double())
    least = torch.linalg.inv(u.T @ u + 1e-4 * torch.eye(DIM)) @ u.T @ v
    w = math.exp(-n / (alpha * DIM))
    found = linear_map(x, y, alpha)
    assert_close(found.matrix.double(), (1 - w) * least + w * torch.eye(DIM), rtol=1e-5, atol=1e-5)
    assert_close(found(x), x @ found.matrix)


def test_the_nonlinear_map_as_written() -> None:
    found = WeaklyNonlinear(DIM, random())
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random(parameter.numel())))
    x = torch.randn(5, DIM, generator=random(3))
    u = x / x.norm(dim=1, keepdim=True)
    e = found.mix.exp() / found.mix.exp().sum()
    hidden = (u @ found.inner + found.inner_bias).clamp(min=0)
    h = e[0] * u + e[1] * u @ found.linear + e[2] * (hidden @ found.outer + found.outer_bias)
    assert_close(found(x), x.norm(dim=1, keepdim=True) * h)
    assert_close(found(3 * x), 3 * found(x))
    assert found(torch.zeros(1, DIM)).isfinite().all()


def test_the_nonlinear_map_follows_a_drift_that_is_not_linear() -> None:
    def drift(x: Tensor) -> Tensor:
        u = F.normalize(x)
        return u + 0.2 * u @ rotation(5) + 0.3 * u.abs()

    x, new = (
        torch.randn(300, DIM, generator=random()),
        F.normalize(torch.randn(300, DIM, generator=random(9))),
    )
    y, right = drift(x), F.normalize(drift(new))
    found = weakly_nonlinear_map(x, y, 600, random(1))
    error = float((found(new) - right).norm(dim=1).mean())
    linear = float((linear_map(x, y, 0)(new) - right).norm(dim=1).mean())
    still = float((new - right).norm(dim=1).mean())
    assert error < linear < still
    assert not any(p.requires_grad for p in found.parameters())
    # From 0.21: nothing but its penalty presses it further down.
    held = weakly_nonlinear_map(x, y, 600, random(1), penalty=0.5)
    assert float(held.mix.softmax(0)[2]) < 0.14 < float(found.mix.softmax(0)[2])


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_the_nonlinear_map_is_fitted_by_adam_on_the_loss_as_written(penalty: float) -> None:
    """The released form has the error alone, as its penalty is added up but never differentiated."""
    x, y = torch.randn(60, DIM, generator=random()), torch.randn(60, DIM, generator=random(2))
    steps, draws = 12, random(1)
    expected = WeaklyNonlinear(DIM, draws)
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    adam = torch.optim.Adam(expected.parameters(), lr=1.0)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 5e-4 + 5e-4 * (1 + math.cos(math.pi * step / steps)) / 2
        some = torch.randint(60, (32,), generator=draws)
        share = expected.mix.exp()[2] / expected.mix.exp().sum()
        adam.zero_grad()
        ((expected.unit(u[some]) - v[some]).square().mean() + penalty * share**2).backward()
        adam.step()
    found = weakly_nonlinear_map(x, y, steps, random(1), penalty)
    for name, parameter in found.named_parameters():
        assert_close(parameter, expected.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_the_share_of_the_mlp_falls_with_its_penalty_where_nothing_drifts() -> None:
    x = torch.randn(100, DIM, generator=random())
    shares = [float(weakly_nonlinear_map(x, x, n, random(1), 0.5).mix.softmax(0)[2]) for n in (1, 200, 500)]
    assert shares[0] > 1.1 * shares[1] > 1.2 * shares[2]


def test_a_linear_map_is_a_module() -> None:
    """As the nonlinear one, it can be differentiated at every mean."""
    matrix, points = rotation(), torch.randn(2, DIM, generator=random())
    jacobian = torch.func.vmap(torch.func.jacrev(Linear(matrix)))(points)
    assert_close(jacobian, matrix.T.expand(2, DIM, DIM))
