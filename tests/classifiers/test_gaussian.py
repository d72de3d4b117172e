"""Scores, temperatures and familiarity of rows against formulas written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from naive_statistics import CPU, DIM, Naive, learned, near, task_images
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.class_statistics import KAPPAS, ClassMoments, ClassStatistics
from duallora.classifiers.covariance import shrunk


@pytest.fixture(scope="module")
def tasks() -> list[tuple[Tensor, Tensor]]:
    return [task_images(3, 9, 0), task_images(2, 6, 1), task_images(4, 5, 2)]


@pytest.fixture
def memory(tasks: list[tuple[Tensor, Tensor]]) -> ClassStatistics:
    return learned(tasks)


@pytest.fixture(scope="module")
def naive(tasks: list[tuple[Tensor, Tensor]]) -> Naive:
    return Naive(tasks)


# -- scores --------------------------------------------------------------------------------------------------


def test_posterior_equals_the_formula(memory: ClassStatistics, naive: Naive) -> None:
    probes = torch.randn(20, DIM, generator=torch.Generator().manual_seed(9)) * 1.5
    expected = torch.stack([(memory.kappa * naive.scores(f)).log_softmax(0) for f in probes])
    near(memory.log_q(probes), expected)
    by_task = torch.stack([expected[:, naive.row_task == t].exp().sum(1).log() for t in range(3)], 1)
    near(memory.by_task(memory.log_q(probes)), by_task)
    assert memory.tasks == 3
    assert 0.3 < float(expected.exp().max(1).values.mean()) < 0.99, "the example must not be trivial"


def test_scores_differ_from_the_formula_by_a_constant_per_image(
    memory: ClassStatistics, naive: Naive
) -> None:
    probes = torch.randn(10, DIM, generator=torch.Generator().manual_seed(9))
    expected = torch.stack([naive.scores(f) for f in probes])
    near(memory.scores(probes) - memory.scores(probes)[:, :1], expected - expected[:, :1])


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_covariance_is_regularised_by_its_diagonal_and_by_a_floor(scale: float) -> None:
    """At the small scale all variances are below 1e-4, and the floor decides."""
    features, labels = task_images(3, 9, 0)
    features = features * scale
    naive, memory = Naive([(features, labels)]), learned([(features, labels)])
    expected = torch.stack([naive.distances(f).min() for f in features])
    near(memory.distance(features)[0], expected, rtol=1e-3)


def spread_out(dim: int = DIM, seed: int = 0) -> Tensor:
    """A covariance with correlations, and variances that differ."""
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + torch.eye(dim, dtype=torch.float64)


@pytest.mark.parametrize(
    ("freedom", "weight"),
    [(1, 0.5 * 6**1.5), (6, 0.5), (24, 0.0625), (600, 5e-4), (6 * 300**2, 1e-4), (1e9, 1e-4)],
)
def test_many_images_leave_the_covariance_and_few_leave_its_diagonal(freedom: float, weight: float) -> None:
    sigma = spread_out()
    found = shrunk(sigma * freedom, freedom)
    assert_close(found, sigma + weight * torch.diag(sigma.diagonal()), rtol=1e-9, atol=1e-9)


def test_in_many_dimensions_the_diagonal_counts_ten_times_at_most() -> None:
    sigma = spread_out(64)
    expected = sigma + 10 * torch.diag(sigma.diagonal())
    for freedom in (1.0, 2.0, 8.0):
        assert_close(shrunk(sigma * freedom, freedom), expected, rtol=1e-9, atol=1e-9)
    assert float((shrunk(sigma * 16, 16.0) - expected).abs().max()) > 0.1


def test_the_scale_of_a_single_feature_does_not_change_scores(tasks: list[tuple[Tensor, Tensor]]) -> None:
    scale = torch.tensor([1.0, 3.0, 0.4, 8.0, 1.0, 0.7])
    plain, scaled = learned(tasks), learned([(f * scale, y) for f, y in tasks])
    probes = torch.randn(20, DIM, generator=torch.Generator().manual_seed(2))
    assert scaled.kappa == plain.kappa
    near(scaled.log_q(probes * scale), plain.log_q(probes), atol=1e-3)
    near(scaled.distance(probes * scale)[0], plain.distance(probes)[0], rtol=1e-3)
    near(scaled.familiarity(probes * scale), plain.familiarity(probes), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_a_feature_without_variance_is_no_division_by_zero(apart: float) -> None:
    """Constant everywhere it says nothing; where it tells classes apart it says all."""
    features, labels = task_images(3, 9, 0, spread=3.0)
    features = features.index_fill(1, torch.tensor([2]), 5.0)
    features[:, 2] += apart * labels
    memory, naive = learned([(features, labels)]), Naive([(features, labels)])
    assert float(memory.moments.scatter[2].abs().max()) < 1e-9, "the feature is dead in every class"
    probes, found = features + 0.3, memory.log_q(features)
    assert bool(found.isfinite().all()) and bool(memory.familiarity(probes).isfinite().all())
    expected = torch.stack([(memory.kappa * naive.scores(f)).log_softmax(0) for f in features])
    near(found, expected, rtol=1e-3, atol=1e-3)
    assert bool(found.argmax(1).eq(labels).all()) == bool(apart)


def test_classes_of_a_single_image_each_are_told_by_the_nearest() -> None:
    """There is no scatter at all: a class is taken to be as wide as the images lie apart in each feature."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(5, DIM, generator=generator)
    memory = learned([(images[:3], torch.arange(3)), (images[3:], torch.arange(2))])
    assert not bool(memory.moments.scatter.any())
    probes = torch.randn(40, DIM, generator=generator)
    found = memory.log_q(probes)
    assert bool(found.isfinite().all()) and bool(memory.familiarity(probes).isfinite().all())
    wide = images.std(0)
    assert found.argmax(1).tolist() == torch.cdist(probes / wide, images / wide).argmin(1).tolist()
    other = learned([(100 * images[:3], torch.arange(3)), (100 * images[3:], torch.arange(2))])
    near(other.log_q(100 * probes), found, atol=1e-3)
    assert memory.log_q(images).argmax(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_leave_one_out_scores_equal_means_recomputed_without_the_image(
    tasks: list[tuple[Tensor, Tensor]], memory: ClassStatistics, naive: Naive, task: int
) -> None:
    features, labels = tasks[task]
    first = int((naive.row_task < task).sum())
    found = memory.log_q(features, memory.own(task, labels, features))
    expected = torch.stack(
        [
            (memory.kappa * naive.scores(f, naive.left_out(first + y, f), first + y)).log_softmax(0)
            for f, y in zip(features.double(), labels.tolist(), strict=True)
        ]
    )
    near(found, expected)
    assert float((found - memory.log_q(features)).abs().max()) > 0.05


def test_a_view_is_scored_against_the_mean_without_its_image_as_the_latest_pass_saw_it(
    tasks: list[tuple[Tensor, Tensor]], memory: ClassStatistics, naive: Naive
) -> None:
    f0, labels = tasks[2]
    view = f0 + 0.3 * torch.randn(f0.shape, generator=torch.Generator().manual_seed(3))
    found = memory.log_q(view, memory.own(2, labels, f0))
    for i, y in enumerate(labels.tolist()):
        mean = naive.left_out(5 + y, f0[i].double())
        near(found[i], (memory.kappa * naive.scores(view[i], mean, 5 + y)).log_softmax(0))


def test_an_only_image_is_left_out_with_its_whole_row() -> None:
    features, labels = task_images(3, 5, 4)
    single = (torch.ones(1, DIM), torch.zeros(1, dtype=torch.long))
    memory = learned([(features, labels), single])
    found = memory.log_q(single[0], memory.own(1, single[1], single[0]))
    assert found[0, 3] == -math.inf
    near(found[0, :3].exp().sum(), torch.tensor(1.0))
    assert float(memory.by_task(found)[0, 1].exp()) == 0
    assert float(memory.losses[1].abs().sum()) == 0, "a row of one image has no say in the temperature"
    assert bool(memory.familiarity(single[0]).isfinite().all())
    distance, row = memory.distance(single[0], memory.own(1, single[1], single[0]))
    assert bool(distance.isfinite().all()) and int(row) < 3


def test_single_images_alone_give_finite_answers() -> None:
    only = (torch.ones(1, DIM), torch.zeros(1, dtype=torch.long))
    memory = learned([only])
    assert torch.equal(memory.log_q(torch.randn(4, DIM)), torch.zeros(4, 1))
    assert torch.equal(memory.log_q(only[0], memory.own(0, only[1], only[0])), torch.zeros(1, 1))
    assert 0 <= float(memory.familiarity(torch.zeros(1, DIM))) <= float(memory.familiarity(only[0])) <= 1


# -- temperature ---------------------------------------------------------------------------------------------


def test_the_grid_of_temperatures_is_geometric_from_a_twentieth_to_one() -> None:
    assert_close(KAPPAS, torch.tensor([0.05 * 20 ** (i / 19) for i in range(20)], dtype=torch.float64))


def test_temperature_losses_equal_the_formula_and_add_up_over_tasks() -> None:
    tasks = [task_images(4, 3, 0, 3.0), task_images(2, 6, 1, 2.0), task_images(4, 3, 2, 3.0)]
    memory, total, chosen = ClassStatistics(DIM, CPU), torch.zeros(20, dtype=torch.float64), []
    for task, (features, labels) in enumerate(tasks):
        memory.replace(task, ClassMoments.of(features, labels, int(labels.max()) + 1))
        earlier = {t: losses.clone() for t, losses in memory.losses.items()}
        memory.fit_temperature(task, features, labels)
        expected = torch.tensor(Naive(tasks[: task + 1]).losses(task), dtype=torch.float64)
        near(memory.losses[task], expected, rtol=1e-3, atol=1e-3)
        assert all(torch.equal(memory.losses[t], losses) for t, losses in earlier.items()), "never recomputed"
        total += expected
        chosen.append(int(total.argmin()))
        assert memory.kappa == pytest.approx(float(KAPPAS[chosen[-1]]))
    assert any(0 < index < 19 for index in chosen), "the example must not sit at the end of the grid"


def test_equal_losses_take_the_largest_temperature() -> None:
    memory = learned([(torch.randn(5, DIM), torch.zeros(5, dtype=torch.long))])
    assert not bool(memory.losses[0].any()), "one row explains everything at any temperature"
    assert memory.kappa == pytest.approx(1.0)
    equal = torch.tensor([3.0, 1.0, 2.0, 1.0, *[5.0] * 16], dtype=torch.float64)
    memory.load_state_dict(
        memory.state_dict() | {"fit.0": torch.cat([equal, torch.ones(2, dtype=torch.float64)])}
    )
    assert memory.kappa == pytest.approx(float(KAPPAS[3]))


def test_rows_of_a_second_pass_replace_those_of_the_first(tasks: list[tuple[Tensor, Tensor]]) -> None:
    memory, plain = learned(tasks[:2]), learned(tasks[:2])
    features, labels = tasks[2]
    memory.replace(2, ClassMoments.of(features + 3, labels, 4))
    memory.fit_temperature(2, features + 3, labels)
    for target in (memory, plain):
        target.replace(2, ClassMoments.of(features, labels, 4))
        target.fit_temperature(2, features, labels)
    assert memory.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(memory.state_dict()[name], tensor), name


# -- familiarity ---------------------------------------------------------------------------------------------


def test_distance_is_mahalanobis_to_the_nearest_mean(memory: ClassStatistics, naive: Naive) -> None:
    probes = torch.randn(20, DIM, generator=torch.Generator().manual_seed(11)) * 2
    expected = torch.stack([naive.distances(f) for f in probes])
    distance, row = memory.distance(probes)
    near(distance, expected.min(1).values)
    assert row.tolist() == expected.argmin(1).tolist()


def test_familiarity_uses_quantile_and_spread_of_the_nearest_rows_task(
    tasks: list[tuple[Tensor, Tensor]], memory: ClassStatistics, naive: Naive
) -> None:
    table = []
    for task, (features, labels) in enumerate(tasks):
        stage = Naive(tasks[: task + 1])  # distances are stored when the task is learned
        first = int((stage.row_task < task).sum())
        found = [stage.unseen(first + y, f) for f, y in zip(features.double(), labels.tolist(), strict=True)]
        ordered = sorted(found)
        position = 0.95 * (len(ordered) - 1)
        low = int(position)
        q95 = ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        centre = sum(found) / len(found)
        spread = math.sqrt(sum((x - centre) ** 2 for x in found) / len(found))
        assert memory.distances[task] == pytest.approx((q95, spread), rel=1e-3)
        table.append((q95, spread))
    probes = torch.randn(30, DIM, generator=torch.Generator().manual_seed(12)) * 2
    nearest_tasks = set()
    for f, found in zip(probes, memory.familiarity(probes).tolist(), strict=True):
        distances = naive.distances(f)
        task = int(naive.row_task[distances.argmin()])
        nearest_tasks.add(task)
        q95, spread = table[task]
        assert found == pytest.approx(
            1 / (1 + math.exp(-(q95 - float(distances.min())) / spread)), rel=1e-3, abs=1e-6
        )
    assert nearest_tasks == {0, 1, 2}


def test_familiarity_falls_with_the_distance(memory: ClassStatistics) -> None:
    near_mean = memory.moments.mean[:1].float()
    values = [float(memory.familiarity(near_mean + step)) for step in (0, 1, 3, 30)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9 and values[-1] < 1e-3


def test_new_images_of_few_images_classes_are_familiar() -> None:
    """About 95 % of unseen images of known classes are at least half familiar, with few images or many."""
    dim = 64
    for per_class in (8, 20, 80):
        generator = torch.Generator().manual_seed(per_class)
        means = 3 * torch.randn(4, dim, generator=generator)
        labels = torch.arange(4).repeat_interleave(per_class)
        memory = ClassStatistics(dim, CPU)
        seen = means[labels] + torch.randn(len(labels), dim, generator=generator)
        memory.replace(0, ClassMoments.of(seen, labels, 4))
        memory.fit_temperature(0, seen, labels)
        fresh = means.repeat(100, 1) + torch.randn(400, dim, generator=generator)
        assert 0.8 < float((memory.familiarity(fresh) >= 0.5).float().mean()) <= 1.0, per_class
        far = means.repeat(100, 1) + 3 * torch.randn(400, dim, generator=generator)
        assert float(memory.familiarity(far).median()) < 0.1, per_class
