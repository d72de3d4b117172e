"""LR-RGDA with HopDC: the discriminant against dense Gaussians, and rows that follow their associations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refit_tools import TASKS, loader_of, started, state_of
from tiny import WIDTH
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.testing import assert_close

from duallora.classifiers.low_rank_gaussian import Factors, LowRankGaussian, largest
from duallora.methods.drift import associative_drift

DIM, CPU = 6, torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(rows: int) -> Tensor:
    x = drawn(rows, 9, DIM, seed=3)
    return x.mT @ x / 8


@pytest.mark.parametrize("rank", [DIM, 2])
@pytest.mark.parametrize("weights", [(0.2, 2.0, 0.5), (1.0, 0.0, 1e-2)])
def test_scores_are_log_densities_of_the_written_covariance(
    rank: int, weights: tuple[float, float, float]
) -> None:
    mean, covariance, f = drawn(4, DIM), covariances(4), drawn(20, DIM, seed=1)
    factor = largest(covariance, rank)
    shared = covariance.mean(0)
    found = LowRankGaussian(mean, shared, factor, weights, CPU).scores(f)
    own = factor.double() @ factor.double().mT
    if rank == DIM:
        assert_close(own, covariance, rtol=1e-5, atol=1e-5)
    a, b, c = weights
    sigma = a * own + b * shared + c * torch.eye(DIM, dtype=torch.float64)
    expected = torch.stack(
        [MultivariateNormal(m, s).log_prob(f) for m, s in zip(mean, sigma, strict=True)], 1
    )
    assert_close(found.log_softmax(1).double(), expected.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_a_factor_is_the_best_of_its_rank() -> None:
    covariance = covariances(3)
    factors = Factors(DIM, 2)
    factors.replace(covariance)
    assert factors.factor.shape == (3, DIM, 2)
    rest = covariance - factors.factor.double() @ factors.factor.double().mT
    values = torch.linalg.eigvalsh(covariance)
    assert_close(torch.linalg.matrix_norm(rest, 2), values[:, -3], rtol=1e-4, atol=1e-5)


def test_the_association_equals_its_formula() -> None:
    x, y, points = drawn(8, 5), drawn(8, 5, seed=1), drawn(3, 4, seed=2)
    found = associative_drift(x, y, points, 4, 0.1, 3)
    for p, drift in zip(points, found, strict=True):
        alike = F.cosine_similarity(p[None], x[:, :4])
        weight = (alike / 0.1).exp()
        weight[alike < alike.topk(3).values[-1]] = 0
        assert_close(drift, (weight[:, None] * (y - x)).sum(0) / weight.sum())


def test_a_small_temperature_follows_the_likest_image() -> None:
    x, y = drawn(8, 5), drawn(8, 5, seed=1)
    assert_close(associative_drift(x, y, 3 * x, 5, 1e-3, 8), y - x)


def moved(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Learns task 1 after task 0; the states after and before, and features of task 1 before and after."""
    learner = started("lr-rgda", 1, learning_rate=0.05, epochs=3, **changes)
    before, images = state_of(learner), next(loader_of(learner, TASKS[1])()).images
    x = learner.method.extract(images)
    learner.learn(TASKS[1])
    return state_of(learner), before, x, learner.method.extract(images)


def test_old_rows_go_where_samples_of_them_go() -> None:
    after, before, x, y = moved(samples=4000)
    draws = started("lr-rgda").method.generator(1, "drift")
    noise = torch.randn(4000, WIDTH, generator=draws).double()
    for row in range(2):
        mean, covariance = (before[f"gaussians.{part}"][row].double() for part in ("mean", "covariance"))
        least = max(1e-4, 1e-5 * float(covariance.diagonal().max()))
        factor = torch.linalg.cholesky(covariance + least * torch.eye(WIDTH, dtype=torch.float64))
        samples = mean + noise @ factor.T
        samples = samples + associative_drift(x.double(), y.double(), samples, WIDTH, 0.05, 400)[:, :WIDTH]
        near = {"rtol": 1e-3, "atol": 1e-3}
        assert_close(after["gaussians.mean"][row].double(), 0.9 * samples.mean(0) + 0.1 * mean, **near)
        spread = 0.9 * torch.cov(samples.T) + 0.1 * covariance
        assert_close(after["gaussians.covariance"][row].double(), spread, **near)
    assert float((after["gaussians.mean"][:2] - before["gaussians.mean"]).abs().max()) > 1e-3
    assert_close(after["rows.mean"][:, :WIDTH].float(), after["gaussians.mean"], rtol=1e-4, atol=1e-4)


def test_without_compensation_they_stay() -> None:
    after, before, x, y = moved(compensate=False)
    assert float((x - y)[:, :WIDTH].abs().max()) > 1e-2, "the features did move"
    assert torch.equal(after["gaussians.mean"][:2], before["gaussians.mean"])
    assert torch.equal(after["rows.mean"][:2], before["rows.mean"])


def test_the_answer_is_the_discriminants_alone() -> None:
    learner = started("lr-rgda", 2, class_rank=3)
    state, images = state_of(learner), next(loader_of(learner, TASKS[0])()).images
    f = learner.method.extract(images)[:, :WIDTH]
    expected = LowRankGaussian(
        state["gaussians.mean"],
        state["gaussians.covariance"].double().mean(0),
        state["factors.factor"],
        (0.2, 2.0, 0.5),
        CPU,
    ).scores(f)
    assert_close(learner.method.logits(images).heads, expected.log_softmax(1))
    assert not any(bool(p.any()) for p in learner.method.heads.parameters())
    assert state["factors.factor"].shape == (5, WIDTH, 3)
