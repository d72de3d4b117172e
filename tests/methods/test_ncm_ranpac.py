"""The methods that classify features of a (once adapted) frozen backbone without gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tasks import (
    Patterns,
    assert_same_outputs,
    assert_same_state,
    new_learner,
    reloaded,
    small_config,
    three_tasks,
    unseen,
)
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch.nn import functional as F

from duallora import METHODS, ContinualLearner
from duallora.methods import Encoding
from duallora.methods.ncm import NCM
from duallora.methods.ranpac import RanPAC
from duallora.runtime.progress import Progress

TEN = [f"class {k}" for k in range(10)]


def features_of(learner: ContinualLearner, data: Patterns) -> torch.Tensor:
    """Final features of an untouched backbone (n, d)."""
    images = torch.stack([learner.preprocess(image) for image in data.images])
    features: torch.Tensor = tiny_backbone()(images)[:, :WIDTH]
    return features


def taught(name: str, tasks: list[Patterns], **changes: object) -> ContinualLearner:
    learner = new_learner(small_config(name, **changes))
    learner.method.context = replace(
        learner.method.context, autocast=nullcontext
    )  # some CPUs would compute the passes in bf16
    for task in tasks:
        learner.learn(task)
    return learner


def ncm(learner: ContinualLearner) -> NCM:
    assert isinstance(learner.method, NCM)
    return learner.method


def ranpac(learner: ContinualLearner) -> RanPAC:
    assert isinstance(learner.method, RanPAC)
    return learner.method


class Noted(Progress):
    """Keeps the lines it is given."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("name", ["ncm", "ranpac"])
def test_nothing_is_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a loss was asked for")

    monkeypatch.setattr(METHODS[name].method, "loss", never)
    progress = Noted()
    learner = ContinualLearner(tiny_backbone(), small_config(name), device="cpu", progress=progress)
    learner.learn(three_tasks()[0])
    learner.learn(Patterns(["single"], 4))
    assert [task.trainable_parameters for task in learner.tasks] == [0, 0]
    assert not learner.method.adapters
    assert not any("single class" in line for line in progress.lines)


def test_a_method_that_trains_says_why_a_single_class_is_skipped() -> None:
    progress = Noted()
    learner = ContinualLearner(tiny_backbone(), small_config("linear"), device="cpu", progress=progress)
    learner.learn(Patterns(["single"], 4))
    assert any("single class" in line for line in progress.lines)


@pytest.mark.parametrize("name", ["ncm", "ranpac"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_bare_backbone(name: str, family: str) -> None:
    method = METHODS[name].method(tiny_backbone(family), small_config(name), 0)
    assert torch.equal(method.extract(tiny_images()), tiny_backbone(family)(tiny_images()))


def test_prototypes_are_normalised_means() -> None:
    tasks = three_tasks()
    learner = taught("ncm", tasks)
    for head, task in zip(learner.method.heads.tasks, tasks, strict=True):
        features, labels = features_of(learner, task), torch.tensor(task.targets)
        for k in range(len(task.classes)):
            mean = features[labels == k].mean(0)
            torch.testing.assert_close(head.get_parameter("weight")[k], mean / mean.norm())
        assert not head.get_parameter("bias").any()


def test_logits_are_scaled_cosines() -> None:
    tasks = three_tasks()
    learner = taught("ncm", tasks, scale=7.0)
    data = unseen(tasks)
    features = features_of(learner, data)
    means = torch.cat(
        [
            torch.stack(
                [features_of(learner, t)[torch.tensor(t.targets) == k].mean(0) for k in range(len(t.classes))]
            )
            for t in tasks
        ]
    )
    cosines = F.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(learner.outputs(data).heads, (7 * cosines).log_softmax(1))
    other = taught("ncm", tasks, scale=70.0).outputs(data).heads
    assert torch.equal(other.argmax(1), cosines.argmax(1))


def test_the_way_classes_come_in_tasks_has_no_part() -> None:
    """Prototypes and ridge scores of ten tasks are those of one task with all ten classes."""
    # Without a shared generator over classes: every class draws its own noise.
    parts = [Patterns([name], 5, seed=k) for k, name in enumerate(TEN)]
    whole = Patterns(TEN, 5)
    whole.images = [image for part in parts for image in part.images]
    images = unseen([whole], 4)
    for name, changes in (("ncm", {}), ("ranpac", {"ridge": 2.0})):
        once, ten = taught(name, [whole], **changes), taught(name, parts, **changes)
        heads = [learner.outputs(images).heads for learner in (once, ten)]
        assert torch.equal(heads[0].argmax(1), heads[1].argmax(1)), name
        if name == "ncm":
            torch.testing.assert_close(heads[1], heads[0], rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(ranpac(ten).ridge.weight, ranpac(once).ridge.weight, rtol=0, atol=1e-4)


def test_the_ridge_solution() -> None:
    tasks = three_tasks()
    learner = taught("ranpac", tasks, ridge=0.5)
    model = ranpac(learner).ridge
    assert model.projection.shape == (32, 48)
    features = torch.cat([features_of(learner, task) for task in tasks])
    first = [0, 2, 5]
    rows = torch.tensor([k + first[t] for t, task in enumerate(tasks) for k in task.targets])
    h = (features @ model.projection).relu().double()
    y = F.one_hot(rows, 7).double()
    expected = torch.linalg.solve(h.T @ h + 0.5 * torch.eye(48, dtype=torch.float64), h.T @ y)
    torch.testing.assert_close(model.weight.double(), expected, rtol=1e-3, atol=1e-5)
    data = unseen(tasks)
    scores = (features_of(learner, data) @ model.projection).relu() @ expected.float()
    torch.testing.assert_close(
        learner.outputs(data).heads, (model.kappa * scores).log_softmax(1), rtol=0, atol=1e-3
    )


def test_without_a_ridge_it_is_chosen_by_validation() -> None:
    fixed, chosen = taught("ranpac", three_tasks(), ridge=1e8), taught("ranpac", three_tasks())
    assert float(ranpac(chosen).ridge.weight.norm()) > 100 * float(ranpac(fixed).ridge.weight.norm())


def test_the_heads_are_kept_as_zeros() -> None:
    for first in (False, True):
        learner = taught("ranpac", three_tasks(), first_session=first)
        assert [len(head.get_parameter("weight")) for head in learner.method.heads.tasks] == [2, 3, 2]
        assert not any(p.any() for p in learner.method.heads.parameters())


def test_a_first_session_trains_the_first_task_alone() -> None:
    tasks = three_tasks()
    learner = new_learner(small_config("ranpac", first_session=True))
    data = unseen(tasks)
    states, features = [], []
    for task in tasks:
        learner.learn(task)
        states.append({k: x.clone() for k, x in learner.method.adapters.state_dict().items()})
        features.append(learner.outputs(data).features)
    trained = [task.trainable_parameters for task in learner.tasks]
    lora = sum(x.numel() for x in states[0].values())
    assert trained == [lora + 2 * 33, 0, 0] and lora > 0
    assert all(x.any() for x in states[0].values()), "B is no longer zero"
    assert not torch.allclose(features[0], features_of(learner, data), atol=1e-3)
    for state, found in zip(states[1:], features[1:], strict=True):
        assert all(torch.equal(state[k], x) for k, x in states[0].items())
        assert torch.equal(found, features[0])
    assert not any(p.requires_grad for p in learner.method.adapters.parameters())
    assert learner.tasks[0].orthogonal_norm is not None and learner.tasks[1].orthogonal_norm is None


def test_a_first_session_of_one_class_leaves_the_backbone_alone() -> None:
    learner = taught("ranpac", [Patterns(["single"], 4), three_tasks()[1]], first_session=True)
    assert [task.trainable_parameters for task in learner.tasks] == [0, 0]
    data = unseen(three_tasks())
    torch.testing.assert_close(learner.outputs(data).features, features_of(learner, data), rtol=0, atol=1e-5)


def test_a_first_session_survives_saving(tmp_path: Path) -> None:
    learner = taught("ranpac", three_tasks()[:1], first_session=True)
    loaded = reloaded(learner, tmp_path / "model")
    loaded.method.context = replace(loaded.method.context, autocast=nullcontext)
    for task in three_tasks()[1:]:
        learner.learn(task)
        loaded.learn(task)
    assert_same_state(loaded, learner)
    assert_same_outputs(loaded.outputs(unseen(three_tasks())), learner.outputs(unseen(three_tasks())))


def test_the_ridge_regression_is_saved_beside_the_rows(tmp_path: Path) -> None:
    learner = taught("ranpac", three_tasks())
    stored = {key for key in learner.method.state() if key.startswith("ridge.")}
    assert stored == {f"ridge.{key}" for key in ranpac(learner).ridge.state_dict()} and stored
    loaded = reloaded(learner, tmp_path / "model")
    assert torch.equal(ranpac(loaded).ridge.weight, ranpac(learner).ridge.weight)
    data = unseen(three_tasks())
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))


def test_the_ridge_regression_and_the_prototypes_read_the_final_feature_alone() -> None:
    for name in ("ncm", "ranpac"):
        learner = taught(name, three_tasks())
        features = learner.method.features(tiny_images())
        other = features.clone()
        other[:, WIDTH:] += 1.0
        assert features.shape[1] > WIDTH
        own, others = (learner.method.head_logits(Encoding(f)) for f in (features, other))
        assert torch.equal(own, others)
        assert not torch.allclose(learner.method.rows.log_q(other), learner.method.rows.log_q(features))
