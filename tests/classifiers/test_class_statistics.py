"""Class statistics: moments that merge, rows that move, and what is saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_statistics import CPU, DIM, Naive, learned, naive_moments, near, task_images
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics


@pytest.fixture(scope="module")
def tasks() -> list[tuple[Tensor, Tensor]]:
    return [task_images(3, 9, 0), task_images(2, 6, 1), task_images(4, 5, 2)]


@pytest.fixture
def memory(tasks: list[tuple[Tensor, Tensor]]) -> ClassStatistics:
    return learned(tasks)


@pytest.fixture(scope="module")
def naive(tasks: list[tuple[Tensor, Tensor]]) -> Naive:
    return Naive(tasks)


# -- moments -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merged_moments_equal_those_of_one_batch(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes) + 3
    features = torch.randn(total, DIM, generator=generator, dtype=torch.float64) * 3 + 5
    labels = torch.cat([torch.arange(3), torch.randint(0, 3, (total - 3,), generator=generator)])
    merged = ClassMoments.empty(3, DIM)
    for x, y in zip(features.split([3, *sizes]), labels.split([3, *sizes]), strict=True):
        merged = merged.merge(ClassMoments.of(x, y, 3))
    mean, scatter = naive_moments(features, labels, 3)
    assert_close(merged.mean, mean, rtol=1e-11, atol=1e-11)
    assert_close(merged.scatter, scatter, rtol=1e-10, atol=1e-9)
    assert merged.count.tolist() == torch.bincount(labels, minlength=3).tolist()


def test_large_offsets_do_not_cancel() -> None:
    """``E[x^2] - mu^2`` in fp32 loses everything at this offset; merging chunk by chunk loses nothing."""
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(9000, DIM, generator=generator) + 1e5).float()
    labels = torch.arange(9000) % 2
    found = ClassMoments.of(features, labels, 2)  # more than one chunk
    mean, scatter = naive_moments(features, labels, 2)
    assert_close(found.scatter, scatter, rtol=1e-8, atol=1e-3)
    assert_close(found.mean, mean, rtol=1e-12, atol=0)
    careless = features.T @ features - sum(
        float((labels == c).sum()) * torch.outer(mean[c].float(), mean[c].float()) for c in range(2)
    )
    assert float((careless - scatter).abs().max()) > float(scatter.diagonal().min())


def test_a_class_missing_from_a_batch_keeps_its_moments() -> None:
    features, labels = task_images(2, 4, 0)
    whole = ClassMoments.of(features, labels, 2)
    merged = whole.merge(ClassMoments.empty(2, DIM)).merge(ClassMoments.of(features[:0], labels[:0], 2))
    assert torch.equal(merged.mean, whole.mean) and torch.equal(merged.scatter, whole.scatter)
    assert not bool(torch.isnan(ClassMoments.of(features[:1], labels[:1], 2).mean).any())


# -- moving and saving ---------------------------------------------------------------------------------------


def test_rows_move_by_the_linear_map(
    tasks: list[tuple[Tensor, Tensor]], memory: ClassStatistics, naive: Naive
) -> None:
    drift = torch.eye(DIM, dtype=torch.float64)
    drift += 0.2 * torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    scatter, losses = memory.moments.scatter.clone(), {t: x.clone() for t, x in memory.losses.items()}
    memory.move(drift)
    near(memory.moments.mean, torch.stack([mu @ drift for mu in naive.mean]))
    near(memory.moments.scatter, drift.T @ scatter @ drift)
    assert all(torch.equal(memory.losses[t], x) for t, x in losses.items())
    # Images moved by the same map have just these rows.
    moved = Naive([(f.double() @ drift, y) for f, y in tasks])
    probes = torch.randn(8, DIM, generator=torch.Generator().manual_seed(6))
    near(memory.distance(probes)[0], torch.stack([moved.distances(f).min() for f in probes]))


def test_new_rows_join_unmoved_after_a_move(tasks: list[tuple[Tensor, Tensor]]) -> None:
    memory = learned(tasks[:2])
    memory.move(1.5 * torch.eye(DIM, dtype=torch.float64))
    old = memory.moments.scatter.clone()
    features, labels = tasks[2]
    memory.replace(2, ClassMoments.of(features, labels, 4))
    mean, scatter = naive_moments(features, labels, 4)
    near(memory.moments.mean[5:], mean)
    near(memory.moments.scatter, old + scatter)


def test_state_restores_scores_temperature_and_familiarity(memory: ClassStatistics) -> None:
    other = ClassStatistics(DIM, CPU)
    other.load_state_dict({name: x.clone() for name, x in memory.state_dict().items()})
    probes = torch.randn(8, DIM)
    assert other.kappa == memory.kappa and other.distances == memory.distances
    assert torch.equal(other.log_q(probes), memory.log_q(probes))
    assert torch.equal(other.familiarity(probes), memory.familiarity(probes))


def test_learning_goes_on_after_a_load_as_without(tasks: list[tuple[Tensor, Tensor]]) -> None:
    through, straight = ClassStatistics(DIM, CPU), learned(tasks)
    through.load_state_dict(learned(tasks[:2]).state_dict())
    features, labels = tasks[2]
    for _ in range(2):  # the pass before and the pass after
        through.replace(2, ClassMoments.of(features, labels, 4))
        through.fit_temperature(2, features, labels)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(through.state_dict()[name], tensor), name
