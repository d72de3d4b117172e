"""Class rows against formulas written out in fp64: moments, scores, temperatures, familiarity."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.class_statistics import KAPPAS, ClassMoments, ClassStatistics
from duallora.classifiers.covariance import shrunk
from duallora.classifiers.log_probabilities import sum_rows

DIM, CPU = 6, torch.device("cpu")
near = partial(assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)


def task_images(classes: int, per_class: int, seed: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that temperatures and posteriors are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * per_class) % classes
    centres = torch.randn(classes, DIM, generator=generator)
    shape = torch.linspace(0.3, 1.5, DIM)
    return centres[labels] + spread * shape * torch.randn(len(labels), DIM, generator=generator), labels


def naive_moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    features, scatter = (
        features.double(),
        torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64),
    )
    mean = torch.stack([features[labels == c].mean(0) for c in range(classes)])
    for f, c in zip(features, labels.tolist(), strict=True):
        scatter += torch.outer(f - mean[c], f - mean[c])
    return mean, scatter


def naive_covariance(scatter: Tensor, freedom: int) -> Tensor:
    """The covariance shrunk to its diagonal, entry by entry."""
    dim = len(scatter)
    weight = sorted([1e-4, (dim / freedom) ** 1.5 / 2, 10.0])[1]
    sigma = scatter / freedom
    variances = [float(sigma[j, j]) for j in range(dim)]
    floor = max(sum(variances) / dim / 1000, 1e-4)
    for j, variance in enumerate(variances):
        sigma[j, j] += weight * max(variance, floor)
    return sigma


class Naive:
    """Rows of several tasks, every quantity by its definition, image by image."""

    def __init__(self, tasks: list[tuple[Tensor, Tensor]]) -> None:
        self.tasks = [(f.double(), y) for f, y in tasks]
        self.row_task = torch.tensor([t for t, (_, y) in enumerate(tasks) for _ in range(int(y.max()) + 1)])
        self.count = torch.cat([torch.bincount(y) for _, y in tasks])
        parts = [naive_moments(f, y, int(y.max()) + 1) for f, y in tasks]
        self.mean = torch.cat([mean for mean, _ in parts])
        scatter = sum(scatter for _, scatter in parts)
        self.sigma = naive_covariance(scatter, max(int(self.count.sum()) - len(self.count), 1))
        self.inverse = torch.linalg.inv(self.sigma)
        self.centre = self.mean.mean(0)
        freedom = max(int(self.count.sum()) - len(self.count), 1)
        self.trace = float((self.inverse @ scatter / freedom).trace())
        self.between = self.spread_of_means()

    def spread_of_means(self) -> float:
        """b of the analysis of variance, row by row."""
        total, rows = int(self.count.sum()), len(self.count)
        centre = sum(n * mu for n, mu in zip(self.count.tolist(), self.mean, strict=True)) / total
        between = sum(
            n * float((mu - centre) @ self.inverse @ (mu - centre))
            for n, mu in zip(self.count.tolist(), self.mean, strict=True)
        )
        return max(between - (rows - 1) * self.trace, 0) / (total - float((self.count**2).sum()) / total)

    def share(self, n: int) -> float:
        """How much of a row's offset counts where its mean comes from n images."""
        best, most = (k * self.between / (k * self.between + self.trace) for k in (n, int(self.count.max())))
        return best / most

    def mean_without(self, row: int, f0: Tensor) -> Tensor:
        """The row's mean recomputed from its other images."""
        task = int(self.row_task[row])
        features, labels = self.tasks[task]
        label = row - int((self.row_task < task).sum())
        others = [
            f for f, y in zip(features, labels.tolist(), strict=True) if y == label and not torch.equal(f, f0)
        ]
        assert len(others) == int(self.count[row]) - 1
        return torch.stack(others).mean(0)

    def scores(self, f: Tensor, mean: Tensor | None = None, without: int | None = None) -> Tensor:
        """Scores around the centre of the rows; the mean of the row ``without`` has an image less."""
        mean, f, found = self.mean if mean is None else mean, f.double() - self.centre, []
        for row, mu in enumerate(mean):
            nu = self.share(int(self.count[row]) - (row == without)) * (mu - self.centre)
            found.append(f @ self.inverse @ nu - nu @ self.inverse @ nu / 2)
        return torch.stack(found)

    def distances(self, f: Tensor, mean: Tensor | None = None) -> Tensor:
        mean = self.mean if mean is None else mean
        return torch.stack([((f.double() - mu) @ self.inverse @ (f.double() - mu)).sqrt() for mu in mean])

    def unseen(self, row: int, f0: Tensor) -> float:
        """Smallest distance with the image taken out of its row's mean and out of the covariance."""
        others, v = self.mean_without(row, f0), f0 - self.mean[row]
        scatter = (int(self.count[row]) - 1) * torch.outer(others - self.mean[row], others - self.mean[row])
        share = (torch.outer(v, v) + scatter) / (int(self.count.sum()) - len(self.count))
        inverse = torch.linalg.inv(self.sigma - share)
        return min(float(((f0 - mu) @ inverse @ (f0 - mu)).sqrt()) for mu in self.left_out(row, f0))

    def left_out(self, row: int, f0: Tensor) -> Tensor:
        """All means, that of ``row`` without the image."""
        mean = self.mean.clone()
        mean[row] = self.mean_without(row, f0)
        return mean

    def losses(self, task: int) -> list[float]:
        """Sum of ``-log q(own row)`` on leave-one-out scores for each temperature."""
        features, labels = self.tasks[task]
        first, result = int((self.row_task < task).sum()), []
        for kappa in [0.05 * 20 ** (i / 19) for i in range(20)]:
            loss = 0.0
            for f, label in zip(features, labels.tolist(), strict=True):
                row = first + label
                if self.count[row] == 1:
                    continue
                scores = kappa * self.scores(f, self.left_out(row, f), row)
                loss -= float(scores[row] - scores.exp().sum().log())
            result.append(loss)
        return result


def learned(tasks: list[tuple[Tensor, Tensor]]) -> ClassStatistics:
    memory = ClassStatistics(tasks[0][0].shape[1], CPU)
    for task, (features, labels) in enumerate(tasks):
        memory.replace(task, ClassMoments.of(features, labels, int(labels.max()) + 1))
        memory.fit_temperature(task, features, labels)
    return memory


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


# -- sums of probabilities -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_sums_over_groups_equal_plain_sums(group: list[int], seed: int) -> None:
    log_rows = (3 * torch.randn(4, len(group), generator=torch.Generator().manual_seed(seed))).log_softmax(1)
    found = sum_rows(log_rows, torch.tensor(group), 4)
    for g in range(4):
        members = [i for i, other in enumerate(group) if other == g]
        expected = log_rows.double()[:, members].exp().sum(1).log()
        near(found[:, g], expected)


def test_a_group_far_below_the_best_does_not_underflow() -> None:
    log_rows = torch.tensor([[0.0, -300.0, -301.0, -math.inf]])
    found = sum_rows(log_rows, torch.tensor([0, 1, 1, 2]), 4)
    near(found[0, 1], torch.tensor(-300 + math.log(1 + math.exp(-1))))
    assert found[0, 2] == found[0, 3] == -math.inf


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
