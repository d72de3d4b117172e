"""Where and how SLDC and SLCA refit their heads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import new_learner, small_config, three_tasks
from tiny import WIDTH
from torch import Tensor
from torch.testing import assert_close

from duallora import ContinualLearner
from duallora.methods import TaskInfo
from duallora.methods import slca as slca_module
from duallora.methods import sldc as sldc_module
from duallora.methods.sldc import SLDC, symmetric_cross_entropy

TASKS = three_tasks()


def started(name: str, tasks: int = 0, **changes: Any) -> ContinualLearner:
    """A learner of the first tasks that computes in fp32 everywhere."""
    learner = new_learner(small_config(name, **changes))
    learner.method.context = replace(learner.method.context, autocast=nullcontext)
    for task in TASKS[:tasks]:
        learner.learn(task)
    return learner


def sldc(learner: ContinualLearner) -> SLDC:
    assert isinstance(learner.method, SLDC)
    return learner.method


def test_a_refit_has_the_released_floor_batch_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(sldc_module, "refit", lambda *parts, **more: given.append((parts, more)))
    learner = started("sldc", 2, refit_learning_rate=0.004)
    (_, mean, factors, loss, optimizer, _, _, batch_size, _), more = given[-1]
    model = sldc(learner).gaussians
    assert torch.equal(mean, model.mean) and loss is symmetric_cross_entropy
    floor = 1e-5 * model.covariance.diagonal(dim1=1, dim2=2).amax(1)
    floor = floor.clamp(min=1e-3)[:, None, None] * torch.eye(WIDTH)
    assert_close(factors @ factors.mT, model.covariance + floor, rtol=1e-4, atol=1e-4)
    assert batch_size // len(mean) == 32 * len(mean) // 10 // len(mean) == 3, "3.2 a class there"
    adam = optimizer([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert (adam["lr"], adam["weight_decay"]) == (0.004, 1e-4)
    assert more == {"end": 0.1}


def test_gaussians_take_the_bytes_that_the_manual_says() -> None:
    for name in ("sldc", "slca"):
        state = started(name, 2).method.state()
        stored = sum(x.numel() * x.element_size() for key, x in state.items() if key.startswith("gaussians"))
        assert stored == 5 * 4 * (32 + 1) ** 2


@pytest.mark.parametrize(("name", "module", "first"), [("sldc", sldc_module, 1), ("slca", slca_module, 2)])
def test_every_refit_starts_from_the_heads_as_they_were_trained(
    name: str, module: Any, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released codes drop refitted heads before the next task; a forgotten class has none."""
    learner, original, at_start = started(name), module.refit, []
    trained: list[Tensor] = []
    consolidate = learner.method.consolidate

    def heads() -> Tensor:
        return torch.cat(
            [torch.cat([h.weight, h.bias[:, None]], 1).detach() for h in learner.method.heads.tasks]  # type: ignore[operator,index]
        )

    def trained_then(task: TaskInfo, loader: Any) -> None:
        trained.append(heads()[-len(task.classes) :])
        consolidate(task, loader)

    def noted(*given: Any, **more: Any) -> None:
        at_start.append(heads())
        original(*given, **more)

    monkeypatch.setattr(learner.method, "consolidate", trained_then)
    monkeypatch.setattr(module, "refit", noted)
    for task in TASKS[:2]:
        learner.learn(task)
    refitted = heads()
    assert not torch.equal(refitted, torch.cat(trained)), "the refit did something"
    learner.forget(name=TASKS[1].classes[1])
    trained[1] = trained[1][[0, 2]]
    learner.learn(TASKS[2])
    assert len(at_start) == 4 - first
    assert torch.equal(at_start[-1], torch.cat(trained))
