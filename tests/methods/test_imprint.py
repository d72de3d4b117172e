"""Heads that start as the classifier of their rows."""

from __future__ import annotations

import pytest
import torch
from small_tasks import Patterns, small_config, three_tasks
from tiny import tiny_backbone
from torch import Tensor
from torch.testing import assert_close

from duallora import METHODS, ContinualLearner
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.methods import TaskInfo
from duallora.methods.interface import Batch

pytestmark = pytest.mark.slow

DIM, CPU = 6, torch.device("cpu")
IMPRINTED = ("duallora", "frozen")


def task_features(classes: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20 * classes) % classes
    centres = 2 * torch.randn(classes, DIM, generator=generator) + shift
    return centres[labels] + torch.randn(len(labels), DIM, generator=generator), labels


def rows_of(*tasks: tuple[Tensor, Tensor]) -> ClassStatistics:
    rows = ClassStatistics(DIM, CPU)
    for task, (f, y) in enumerate(tasks):
        rows.replace(task, ClassMoments.of(f, y, int(y.max()) + 1))
        rows.fit_temperature(task, f, y)
    return rows


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_a_classifier_gives_the_scores_of_its_rows_up_to_one_constant_an_image(shift: float) -> None:
    first, second = task_features(2, 0, shift), task_features(3, 1, shift)
    rows = rows_of(first, second)
    f = torch.cat([first[0], second[0]])
    weight, bias = (torch.cat(parts) for parts in zip(rows.linear(0), rows.linear(1), strict=True))
    assert weight.shape == (5, DIM) and bias.shape == (5,)
    offset = f @ weight.T + bias - rows.kappa * rows.scores(f)
    # One constant for the rows of both tasks: their classifiers can be compared.
    assert_close(offset, offset.mean(1, keepdim=True).expand_as(offset), rtol=0, atol=2e-2)


def test_the_origin_of_the_classifiers_is_the_first_task_and_stays_there() -> None:
    first, second = task_features(2, 0, 50.0), task_features(3, 1, 70.0)
    for rows in (rows_of(first), rows_of(first, second)):
        weight, bias = rows.linear(0)
        centre = ClassMoments.of(*first, 2).mean.mean(0).float()
        nu = (weight @ centre + bias) / rows.kappa
        assert float(nu.max()) <= 1e-3, (
            "at the origin a score is -|nu|^2 / 2, however far from 0 features lie"
        )
        assert float(nu.abs().max()) < 50


def started(name: str) -> tuple[ContinualLearner, list[Batch]]:
    """A learner that has learned one task and prepared the next, and the images of that."""
    learner = ContinualLearner(tiny_backbone(), small_config(name), device="cpu")
    first, second = three_tasks()[:2]
    learner.learn(first)
    images = torch.stack([learner.preprocess(image) for image in second.images])
    batch = Batch(images, torch.tensor(second.targets), torch.arange(len(images)))
    learner.method.prepare(TaskInfo(1, "second", tuple(second.classes)), lambda: iter([batch]))
    return learner, [batch]


@pytest.mark.parametrize("name", IMPRINTED)
def test_before_training_a_head_answers_as_its_rows(name: str) -> None:
    learner, (batch,) = started(name)
    method = learner.method
    with torch.no_grad():
        features = method.features(batch.images)
    scores = method.rows.kappa * method.rows.scores(features)[:, method.rows.task == 1]
    logits = method.heads.current(features).detach()
    assert_close(logits.log_softmax(1), scores.log_softmax(1), rtol=1e-3, atol=1e-2)
    assert float((logits.argmax(1) == batch.labels).float().mean()) > 0.8
    assert method.heads.current(features).requires_grad


@pytest.mark.parametrize("name", IMPRINTED)
def test_the_rows_of_the_start_are_replaced_by_those_after_training(name: str) -> None:
    learner, (batch,) = started(name)
    method, count = learner.method, learner.method.rows.moments.count.clone()
    method.consolidate(TaskInfo(1, "second", ("cat", "dog", "elk")), lambda: iter([batch]))
    assert_close(method.rows.moments.count, count)
    with torch.no_grad():
        expected = ClassMoments.of(method.features(batch.images), batch.labels, 3)
    assert_close(method.rows.moments.mean[-3:], expected.mean, rtol=1e-4, atol=1e-4)


def test_only_duallora_and_its_controls_start_so() -> None:
    for name, entry in METHODS.items():
        assert entry.method.imprinted == (name in (*IMPRINTED, "joint")), name


def test_an_imprinted_head_is_read_beside_the_final_feature() -> None:
    learner = ContinualLearner(tiny_backbone(), small_config("frozen"), device="cpu")
    learner.learn(Patterns(["ant", "bee"], 6))
    assert learner.method.heads.tasks[0].weight.shape == (2, learner.backbone.row_dim)


def test_a_move_of_the_rows_reaches_the_scatter_without_the_latest_task() -> None:
    first, second = task_features(2, 0), task_features(3, 1)
    rows = rows_of(first, second)
    drift = torch.eye(DIM, dtype=torch.float64) + 0.1
    rows.move(drift)
    rows.replace(1, ClassMoments.of(*second, 3))
    own = ClassMoments.of(*first, 2).scatter
    assert_close(rows.moments.scatter, drift.T @ own @ drift + ClassMoments.of(*second, 3).scatter)
