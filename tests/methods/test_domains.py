"""A residual adapter for each domain: opened where the memory does not know the images, else shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from duallora_tools import judge
from small_tasks import (
    Patterns,
    assert_same_outputs,
    assert_same_state,
    new_learner,
    one_domain,
    reloaded,
    small_config,
    tiny_backbone,
)

from duallora import ContinualLearner
from duallora.adapters.dual_lora import DualAdapter
from duallora.data.colours import Colours
from duallora.data.transforms import Augmentation

DEPTH = 3


@pytest.fixture(autouse=True)
def adapters_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain keeps its adapters."""
    judge(monkeypatch, helps=True)


def learned(tasks: list[Patterns], **changes: Any) -> ContinualLearner:
    learner = new_learner(small_config(residual="own", **({"known_domain": 0.25} | changes)), depth=DEPTH)
    for task in tasks:
        learner.learn(task)
    return learner


def residuals(learner: ContinualLearner) -> set[int]:
    """Tasks that have a residual adapter of their own."""
    modules = learner.method.adapted.values()  # type: ignore[attr-defined]
    return {part.task for m in modules for g in m.groups.values() for part in g.residuals}


def test_a_known_domain_is_joined_and_an_unknown_one_is_opened() -> None:
    tasks = one_domain()
    far = Patterns(["gnu", "hen"], 8, 5)
    learner = learned([*tasks[:2], far])
    assert learner.method.memory.domains.uses == [0, 0, 2]  # type: ignore[attr-defined]
    assert residuals(learner) == {0, 2}
    for module in learner.method.adapted.values():  # type: ignore[attr-defined]
        for group in module.groups.values():
            assert group.owners == [0, 2]  # a known domain keeps its features


def test_the_adapter_of_a_domain_gets_the_weights_of_all_its_tasks() -> None:
    tasks = one_domain()
    learner = learned([*tasks[:2], Patterns(["gnu", "hen"], 8, 5)])
    gate = learner.outputs(tasks[0]).gate
    assert gate is not None
    assert torch.equal(gate[:, 0], gate[:, 1])
    assert bool((gate[:, 0] > 0.99).all())
    assert bool((gate <= 1).all())


@pytest.mark.parametrize(("known_domain", "uses"), [(0.0, [0, 0, 0]), (1.5, [0, 1, 2])])
def test_the_threshold_decides(known_domain: float, uses: list[int]) -> None:
    tasks = [
        Patterns(names, 8, seed)
        for seed, names in enumerate((["ant", "bee"], ["cat", "dog"], ["elk", "fox"]))
    ]
    learner = learned(tasks, known_domain=known_domain)
    assert learner.method.memory.domains.uses == uses  # type: ignore[attr-defined]
    assert residuals(learner) == set(uses)


def test_a_task_does_not_join_a_domain_that_nothing_was_trained_in() -> None:
    single = Patterns(["ant"], 8, 0)
    learner = learned([single, *one_domain()[1:]], known_domain=0.0)
    assert learner.method.memory.domains.uses == [0, 1, 1]  # type: ignore[attr-defined]


def test_the_adapter_of_a_domain_goes_with_the_last_task_that_uses_it() -> None:
    learner = learned(one_domain(), known_domain=0.0)
    learner.forget(task="task 1")
    assert residuals(learner) == {0}
    learner.learn(Patterns(["gnu", "hen"], 8, 5))
    learner.forget(task="task 2")
    learner.forget(task="task 3")
    assert residuals(learner) == {0}  # the fourth task is in the domain too
    assert learner.method.memory.domains.uses == [0, 0, 0, 0]  # type: ignore[attr-defined]


def test_a_domain_without_tasks_has_no_adapter() -> None:
    learner = learned([*one_domain()[:1], Patterns(["gnu", "hen"], 8, 5)])
    assert residuals(learner) == {0, 1}
    learner.forget(task="task 1")
    assert residuals(learner) == {1}


def test_domains_survive_a_round_trip_and_learning_goes_on(tmp_path: Path) -> None:
    tasks = [*one_domain(), Patterns(["gnu", "hen"], 8, 5)]
    learner = learned(tasks)
    loaded = reloaded(learner, tmp_path / "all", depth=DEPTH)
    assert_same_outputs(loaded.outputs(tasks[1]), learner.outputs(tasks[1]))
    resumed = reloaded(learned(tasks[:2]), tmp_path / "two", depth=DEPTH)
    for task in tasks[2:]:
        resumed.learn(task)
    assert_same_state(resumed, learner)


def test_the_residual_adapter_of_a_domain_does_not_move_another_ones_features() -> None:
    first, far = one_domain()[0], Patterns(["gnu", "hen"], 8, 5)
    learner = learned([first], rank=0)
    before = learner.outputs(first).features
    learner.learn(far)
    # Beside the gate's share of the new adapter nothing has changed.
    assert torch.allclose(learner.outputs(first).features, before, atol=1e-4)


def test_heads_answer_on_top_of_the_rows_as_they_are_now() -> None:
    """A head that training did not change answers as its rows do, whatever tasks came after it."""
    tasks = one_domain()
    learner = new_learner(small_config("frozen", head_learning_rate=1e-12), depth=DEPTH)
    for task in tasks:
        learner.learn(task)
    images = torch.stack([learner.preprocess(image) for image, _ in tasks[0]])
    method = learner.method
    with torch.no_grad():
        found = method.logits(images)
        rows = method.rows.log_q(method.extract(images).float())
    assert torch.allclose(found.heads, rows, atol=1e-4)


def test_after_the_first_task_of_a_domain_its_head_is_the_classifier_of_its_rows() -> None:
    learner = learned(one_domain()[:1])
    method, (head,) = learner.method, learner.method.heads.tasks
    assert method.leader is None
    weight, bias = method.rows.linear(0)
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias)
    assert torch.equal(method.starts.tasks[0].weight, weight)


def test_what_leads_reads_the_final_feature_and_the_mean_patch_token() -> None:
    learner = new_learner(small_config(residual="own", known_domain=0.25), depth=DEPTH)
    method, leading = learner.method, []
    groups = method.parameter_groups

    def watched() -> list[dict[str, Any]]:
        found = groups()
        leading.append([tuple(p.shape) for p in found[0]["params"]])
        return found

    method.parameter_groups = watched  # type: ignore[method-assign]
    for task in one_domain()[:2]:
        learner.learn(task)
    backbone = method.backbone
    assert leading[0] == [(2, backbone.feature_dim), (2,), (2, backbone.dim), (2,)]
    assert leading[1] == [(2, method.backbone.row_dim), (2,)]


@pytest.mark.parametrize(("fields", "moves"), [({}, True), ({"known_domain": 2.0}, False)])
def test_residual_bases_move_in_the_first_task_of_a_domain_alone(
    fields: dict[str, Any], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, torch.Tensor]] = []
    begin = DualAdapter.begin

    def noted(self: DualAdapter, task: int, a: torch.Tensor, psi: torch.Tensor, *rest: Any) -> None:
        opened.append((task, psi.clone()))
        begin(self, task, a, psi, *rest)

    monkeypatch.setattr(DualAdapter, "begin", noted)
    learner = learned(one_domain()[:1], **fields)
    groups = [group for module in learner.method.adapted.values() for group in module.groups.values()]  # type: ignore[attr-defined]
    trained = [part.psi for group in groups for part in group.residuals]
    assert len(trained) == len(opened) > 0
    for (task, start), end in zip(opened, trained, strict=True):
        assert task == 0 and torch.equal(start, end) != moves


@pytest.mark.parametrize(("augment", "wanted"), [("crop", [0]), ("none", [])])
def test_views_get_other_colours_where_adapters_are_led_alone(
    augment: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured: list[int] = []

    class Noted(Colours):
        def __init__(self, augmentation: Augmentation) -> None:
            super().__init__(augmentation)
            coloured.append(augmentation.task)

    monkeypatch.setattr("duallora.training.Colours", Noted)
    config = small_config(residual="own", known_domain=0.25)
    learner = ContinualLearner(tiny_backbone(depth=DEPTH), config, augment=augment, device="cpu")
    for task in one_domain()[:2]:
        learner.learn(task)
    assert coloured == wanted
