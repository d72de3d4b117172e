"""Adapters have to prove themselves on a domain's second task, or go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from duallora_tools import judge
from small_tasks import Patterns, assert_same_state, new_learner, one_domain, reloaded, small_config

from duallora import ContinualLearner, DualLoRAError
from duallora.adapters.dynamic_memory import DynamicMemory
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.methods.probation import Probation, harmed, losses_of_unseen

DEPTH = 3
CPU = torch.device("cpu")
LABELS = torch.arange(3).repeat(20)


def spread(space: float, seed: int = 0) -> torch.Tensor:
    """Features (60, 6) whose classes lie ``space`` from the middle, in noise of 1."""
    noise = torch.randn(60, 6, generator=torch.Generator().manual_seed(seed))
    return noise + space * torch.eye(6)[LABELS]


def tasks() -> list[Patterns]:
    """Three of one domain, then one of another."""
    return [*one_domain(), Patterns(["gnu", "hen"], 8, 5)]


@pytest.fixture(autouse=True)
def all_of_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory says which tasks are of one domain, not the random weights of the backbone."""
    uses_of = DynamicMemory.join

    def join(self: DynamicMemory, task: int, f0: Any, threshold: float, adapted: Any) -> None:
        uses_of(self, task, f0, 0.0, adapted)

    monkeypatch.setattr(DynamicMemory, "join", join)


def learner_of(some: list[Patterns], **fields: Any) -> ContinualLearner:
    learner = new_learner(small_config(residual="own", **({"known_domain": 0.25} | fields)), depth=DEPTH)
    for task in some:
        learner.learn(task)
    return learner


def adapters(learner: ContinualLearner) -> list[Any]:
    modules = learner.method.adapted.values()  # type: ignore[attr-defined]
    return [group for module in modules for group in module.groups.values()]


def probation(learner: ContinualLearner) -> Probation:
    found: Probation = learner.method.probation  # type: ignore[attr-defined]
    return found


def plain(learner: ContinualLearner, task: Patterns) -> ClassMoments:
    """Of a task's images under the model as it is."""
    images = torch.stack([learner.preprocess(image) for image, _ in task])
    with torch.no_grad():
        features = learner.method.features(images)
    return ClassMoments.of(features, torch.tensor([label for _, label in task]), 2)


def test_adapters_that_do_not_help_go_and_rows_are_as_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge(monkeypatch, helps=False)
    some = tasks()
    learner = learner_of(some[:1])
    assert 0 in probation(learner) and all(group.residuals and group.factors for group in adapters(learner))
    learner.learn(some[1])
    assert not any(group.residuals or group.factors for group in adapters(learner))
    assert all(m.effective is None for m in learner.method.adapted.values())  # type: ignore[attr-defined]
    first, second = plain(learner, some[0]), plain(learner, some[1])
    rows = learner.method.rows
    assert torch.allclose(rows.mean, torch.cat([first.mean, second.mean]), atol=1e-5)
    assert torch.allclose(rows.scatter, first.scatter + second.scatter, atol=1e-3)
    assert not len(dict(probation(learner).groups()))


def test_rows_of_a_first_task_are_scored_as_if_nothing_had_been_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge(monkeypatch, helps=False)
    some = tasks()
    learner = learner_of(some[:2])
    features = torch.stack([learner.preprocess(image) for image, _ in some[0]])
    with torch.no_grad():
        f = learner.method.features(features)
    fresh = ClassStatistics(f.shape[1], f.device)
    fresh.replace(0, ClassMoments.of(f, torch.tensor([label for _, label in some[0]]), 2))
    fresh.fit_temperature(0, f, torch.tensor([label for _, label in some[0]]))
    assert torch.allclose(learner.method.rows.fit[0], fresh.fit[0], rtol=1e-3, atol=1e-3)
    head, start = learner.method.heads.tasks[0], learner.method.starts.tasks[0]
    assert torch.equal(head.weight, start.weight) and torch.equal(head.bias, start.bias)


def test_the_domain_stays_known_and_its_later_tasks_train_their_heads_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge(monkeypatch, helps=False)
    learner = learner_of(tasks()[:3])
    assert learner.method.memory.domains.uses == [0, 0, 0]  # type: ignore[attr-defined]
    assert not any(group.residuals or group.factors for group in adapters(learner))
    head, start = learner.method.heads.tasks[2], learner.method.starts.tasks[2]
    assert not torch.equal(head.weight, start.weight)
    assert learner.tasks[2].trainable_parameters == sum(p.numel() for p in head.parameters())


def test_adapters_that_help_stay_and_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    some, asked = tasks(), []

    def no(adapted: torch.Tensor, plain: torch.Tensor, *_: Any) -> bool:
        asked.append(torch.equal(adapted, plain))
        return False

    monkeypatch.setattr("duallora.methods.duallora.harmed", no)
    learner = learner_of(some[:3])
    assert asked == [False]
    assert all(group.residuals for group in adapters(learner))
    assert not len(dict(probation(learner).groups()))


def test_the_look_without_adapters_leaves_them_as_they_are() -> None:
    learner = learner_of(tasks()[:1])
    before = {name: tensor.clone() for name, tensor in learner.method.state().items()}
    images = torch.stack([learner.preprocess(image) for image, _ in tasks()[0]])
    with torch.no_grad():
        known = learner.method.features(images)
        for module in learner.method.adapted.values():  # type: ignore[attr-defined]
            with module.without(0):
                assert not module.groups["kv"].residuals
        assert torch.equal(learner.method.features(images), known)
    for name, tensor in learner.method.state().items():
        assert torch.equal(tensor, before[name]), name


def test_a_loaded_model_decides_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judge(monkeypatch, helps=False)
    some = tasks()
    learner = learner_of(some[:1])
    loaded = reloaded(learner, tmp_path / "one", depth=DEPTH)
    for each in (learner, loaded):
        each.learn(some[1])
    assert_same_state(loaded, learner)


def test_a_class_that_is_forgotten_has_no_earlier_row_either(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, helps=False)
    some = tasks()
    learner = learner_of(some[:1])
    learner.forget(name="ant")
    learner.learn(some[1])
    assert torch.allclose(learner.method.rows.mean[0], plain(learner, some[0]).mean[1], atol=1e-5)
    learner = learner_of([some[0], Patterns(["cow"], 8, 3)])
    assert 0 in probation(learner)  # a single class proves nothing
    learner.forget(task="task 1")
    assert 0 not in probation(learner)


def test_no_domain_is_on_probation_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the memory decides: the second task is of another domain
    some = tasks()
    learner = learner_of([some[0], some[3]])
    assert learner.method.memory.domains.uses == [0, 1]  # type: ignore[attr-defined]
    assert 0 not in probation(learner) and 1 not in probation(learner)


def test_what_is_noted_has_to_fit_the_rows(tmp_path: Path) -> None:
    learner = learner_of(tasks()[:1])
    mean, fit, scatter = probation(learner)[0]
    probation(learner).put(0, mean[:1], fit, scatter)
    with pytest.raises(DualLoRAError, match=r"probation\.0\.mean does not fit the rows"):
        reloaded(learner, tmp_path / "model", depth=DEPTH)


def test_images_that_are_told_apart_better_lose_less() -> None:
    near, far = spread(1.0), spread(4.0)
    assert losses_of_unseen(far, LABELS, 3).mean() < losses_of_unseen(near, LABELS, 3).mean()
    assert harmed(near, far, LABELS, 3) and not harmed(far, near, LABELS, 3)


def test_what_chance_may_have_done_harms_nobody() -> None:
    one, other = spread(1.0), spread(1.0) + 0.02 * spread(0.0, seed=4)
    losses = [losses_of_unseen(features, LABELS, 3) for features in (one, other)]
    harm = losses[1] - losses[0]
    error = float(harm.std()) / len(harm) ** 0.5
    assert abs(float(harm.mean())) < error, "or this test says nothing"
    assert not harmed(one, other, LABELS, 3) and not harmed(other, one, LABELS, 3)
    assert not harmed(one, one, LABELS, 3)


def test_losses_are_those_by_which_rows_choose_their_temperature() -> None:
    features = spread(1.0)
    rows = ClassStatistics(6, CPU)
    rows.replace(0, ClassMoments.of(features, LABELS, 3))
    rows.fit_temperature(0, features, LABELS)
    assert torch.allclose(losses_of_unseen(features, LABELS, 3).sum(), rows.losses[0].min())


def test_an_only_image_of_its_class_has_no_loss() -> None:
    labels = torch.cat([LABELS, torch.tensor([3])])
    features = torch.cat([spread(1.0), torch.ones(1, 6)])
    assert losses_of_unseen(features, labels, 4).shape == (60,)
    assert not harmed(features[:3], features[:3], torch.arange(3), 3)
