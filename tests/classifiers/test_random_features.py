"""Ridge on random features: sums over tasks, leave-one-out and cross-validation against explicit refits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from duallora.classifiers.random_features import KAPPAS, RIDGES, RandomFeatureModel

DIM, SIZE, CPU = 8, 40, torch.device("cpu")
near = partial(assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)
Task = tuple[Tensor, Tensor, int]


def task_images(classes: int, per_class: int, seed: int, noise: float = 1.0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * per_class) % classes
    centres = torch.randn(classes, DIM, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), DIM, generator=generator), labels, classes


TASKS = [task_images(3, 30, 0), task_images(2, 25, 1), task_images(1, 12, 2)]


def learned(tasks: list[Task], ridge: float | None = None, size: int = SIZE) -> RandomFeatureModel:
    model = RandomFeatureModel(DIM, size, ridge, 0, CPU)
    for task, (features, labels, classes) in enumerate(tasks):
        model.add(task, features, labels, classes)
    return model


def design(model: RandomFeatureModel, tasks: list[Task]) -> tuple[Tensor, Tensor]:
    """Random features (n, M) and one-hot rows (n, R) of all images of all tasks, fp64."""
    first, rows = 0, []
    for _, labels, classes in tasks:
        rows.append(labels + first)
        first += classes
    h = (torch.cat([f for f, _, _ in tasks]) @ model.projection).clamp(min=0).double()
    return h, F.one_hot(torch.cat(rows), first).double()


def ridge_fit(h: Tensor, y: Tensor, ridge: float) -> Tensor:
    return torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1], dtype=torch.float64), h.T @ y)


def cross_validation(h: Tensor, y: Tensor, ridge: float) -> float:
    """``RSS / (1 - tr H / n)^2`` by ``I - H = ridge (K + ridge I)^-1``, exact where the fit interpolates."""
    eye = torch.eye(len(h), dtype=torch.float64)
    left = ridge * torch.linalg.inv(h @ h.T + ridge * eye)
    return float((left @ y).square().sum() / (left.trace() / len(h)) ** 2)


def test_several_tasks_give_the_solution_of_all_images_at_once() -> None:
    model = learned(TASKS, ridge=0.5)
    h, y = design(model, TASKS)
    assert_close(model.weight.double(), ridge_fit(h, y, 0.5), rtol=1e-6, atol=1e-6)
    features, labels, first = torch.cat([f for f, _, _ in TASKS]), [], 0
    for _, task_labels, classes in TASKS:
        labels.append(task_labels + first)
        first += classes
    at_once = learned([(features, torch.cat(labels), first)], ridge=0.5)
    assert_close(model.weight, at_once.weight, rtol=1e-6, atol=1e-6)
    # The random features are fp32, and round by the number of images that are lifted at once.
    assert_close(model.gram, at_once.gram, rtol=0, atol=1e-6 * float(at_once.gram.abs().max()))


def test_posterior_is_a_softmax_of_the_scores() -> None:
    model = learned(TASKS, ridge=0.5)
    probes = torch.randn(7, DIM)
    scores = (probes @ model.projection).clamp(min=0).double() @ model.weight.double()
    near(model.log_q(probes), (model.kappa * scores).log_softmax(1), atol=1e-4)


@pytest.mark.parametrize("ridge", [0.1, 5.0])
def test_leave_one_out_losses_equal_explicit_refits(ridge: float) -> None:
    for count in (1, 2):
        tasks = TASKS[:count]
        model = learned(tasks, ridge)
        h, y = design(model, tasks)
        own = slice(len(h) - len(tasks[-1][0]), len(h))
        expected = torch.zeros(20, dtype=torch.float64)
        for i in range(own.start, own.stop):
            others = torch.arange(len(h)) != i
            z = h[i] @ ridge_fit(h[others], y[others], ridge)
            row = int(y[i].argmax())
            expected += torch.stack([-(10 ** (2 * k / 19) * z).log_softmax(0)[row] for k in range(20)])
        near(model.losses[count - 1], expected, rtol=1e-4, atol=1e-3)


def test_temperature_is_the_best_over_all_tasks_and_the_largest_among_equals() -> None:
    model = learned(TASKS[:2], ridge=1.0)
    first = learned(TASKS[:1], ridge=1.0).losses[0]
    assert torch.equal(model.losses[0], first), "a task's losses are never recomputed"
    total = model.losses[0] + model.losses[1]
    assert model.kappa == pytest.approx(float(10 ** (2 * int(total.argmin()) / 19)))
    assert 0 < int(total.argmin()) < 19
    single = learned([TASKS[2]], ridge=1.0)
    assert not bool(single.losses[0].any())
    assert single.kappa == pytest.approx(100.0) == float(KAPPAS[-1])


def chosen_ridge(model: RandomFeatureModel, h: Tensor, y: Tensor) -> float:
    """Which ridge of the grid the model's solution belongs to."""
    gaps = [float((model.weight.double() - ridge_fit(h, y, ridge)).norm()) for ridge in RIDGES.tolist()]
    best = min(range(len(gaps)), key=gaps.__getitem__)
    assert gaps[best] < 1e-3 * float(model.weight.norm())
    return float(RIDGES[best])


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.5])
def test_the_ridge_is_the_best_by_generalised_cross_validation(noise: float) -> None:
    tasks = [task_images(3, 40, 3, noise), task_images(2, 30, 4, noise)]
    for count in (1, 2):
        model = learned(tasks[:count])
        h, y = design(model, tasks[:count])
        best = min(RIDGES.tolist(), key=lambda ridge: cross_validation(h, y, ridge))
        assert chosen_ridge(model, h, y) == pytest.approx(best)
        assert RIDGES[0] < best < RIDGES[-1]


@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_is_right_with_more_features_than_images(seed: int) -> None:
    """A small ridge interpolates: residual and freedom vanish, and their ratio must not be round-off."""
    tasks = [task_images(3, 20, seed, 1.0)]
    model = learned(tasks, size=300)
    h, y = design(model, tasks)
    values = {ridge: cross_validation(h, y, ridge) for ridge in RIDGES.tolist()}
    eye, gaps = torch.eye(len(h), dtype=torch.float64), {}
    for ridge in RIDGES.tolist():
        weight = h.T @ torch.linalg.solve(h @ h.T + ridge * eye, y)
        gaps[ridge] = float((model.weight.double() - weight).norm())
    chosen = min(gaps, key=gaps.__getitem__)
    assert values[chosen] <= 1.001 * min(values.values())


def test_a_single_image_can_be_learned() -> None:
    model = learned([(torch.ones(1, DIM), torch.zeros(1, dtype=torch.long), 1), TASKS[0]])
    assert model.weight.shape == (SIZE, 4)
    assert bool(torch.isfinite(model.log_q(torch.randn(3, DIM))).all())
    assert all(bool(torch.isfinite(losses).all()) for losses in model.losses.values())


def test_state_restores_the_model_and_learning_goes_on() -> None:
    straight, other = learned(TASKS[:2]), RandomFeatureModel(DIM, SIZE, None, 99, CPU)
    other.load_state_dict({name: x.clone() for name, x in learned(TASKS[:1]).state_dict().items()})
    other.add(1, *TASKS[1])
    for name, tensor in straight.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    probes = torch.randn(5, DIM)
    assert torch.equal(other.log_q(probes), straight.log_q(probes))
