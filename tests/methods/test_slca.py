"""SLCA: an adapted backbone, Gaussians of all classes, and heads aligned on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refit_tools import TASKS, prepared, slca, started, state_of
from tiny import FAMILIES, tiny_backbone, tiny_images
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from duallora import METHODS
from duallora.methods import TaskInfo
from duallora.methods import slca as slca_module
from duallora.methods import sldc as sldc_module
from duallora.methods.slca import normalised_cross_entropy

# -- SLCA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_starts_as_the_backbone(family: str) -> None:
    entry, images = METHODS["slca"], tiny_images()
    backbone = tiny_backbone(family)
    method = entry.method(backbone, entry.config(), 0)
    assert torch.equal(method.extract(images), tiny_backbone(family)(images))
    assert not {p.data_ptr() for p in backbone.parameters()} & {
        p.data_ptr() for p in method.adapters.parameters()
    }
    with torch.no_grad():
        for parameter in method.adapters.parameters():
            parameter.mul_(1.5)
    assert float((method.extract(images) - backbone(images)).detach().abs().max()) > 1e-2
    assert torch.equal(backbone(images), tiny_backbone(family)(images))


def test_the_whole_backbone_is_trained_and_stays_as_it_was() -> None:
    learner = started("slca", 2)
    original = dict(tiny_backbone().named_parameters())
    for name, parameter in learner.backbone.named_parameters():
        assert torch.equal(parameter, original[name]) and not parameter.requires_grad, name
    state = learner.method.state()
    for name, parameter in original.items():
        assert not torch.equal(state[f"adapters.backbone.{name.replace('.', '/')}"], parameter), name
    count = sum(p.numel() for p in original.values())
    assert [task.trainable_parameters for task in learner.tasks] == [count + 2 * 33, count + 3 * 33]
    assert learner.tasks[0].stored_bytes > 4 * count


def test_the_backbone_has_a_fraction_of_the_rate() -> None:
    method, _ = prepared(started("slca", backbone_rate=0.25, head_learning_rate=0.4), 0)
    head, backbone = method.parameter_groups()
    assert head["lr"] == 0.4 and backbone["lr"] == pytest.approx(0.1)
    assert {id(p) for p in head["params"]} == {id(p) for p in method.heads.tasks[-1].parameters()}
    assert len(backbone["params"]) == len(list(method.backbone.parameters()))
    assert all(p.requires_grad for p in backbone["params"])


def test_alignment_changes_heads_alone_and_from_the_second_task_on() -> None:
    for tasks in (1, 2):
        plain = started("slca", tasks, refit_epochs=0).method.state()
        for name, x in started("slca", tasks).method.state().items():
            assert torch.equal(x, plain[name]) != (tasks > 1 and name.startswith("heads")), name


def test_alignment_draws_from_means_that_shrink_with_age(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(heads: object, mean: Tensor, factors: Tensor, *_: object) -> None:
        seen.append((mean, factors))

    monkeypatch.setattr(slca_module, "refit", noted)
    learner = started("slca", 3)
    assert len(seen) == 2
    mean, factors = seen[1]
    model = slca(learner).gaussians
    scale = torch.tensor([0.9 + 0.1 / 3] * 2 + [0.9 + 0.2 / 3] * 3 + [1.0] * 2)
    assert_close(mean, model.mean * scale[:, None])
    assert_close(factors @ factors.mT, model.covariance, rtol=1e-3, atol=1e-2)


def test_logits_are_normalised_by_the_tasks_that_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten task has no logits, so its norm of 0 must not enter the mean."""
    learner = started("slca", 2)
    learner.forget(task="task 1")
    given: list[Any] = []
    monkeypatch.setattr(slca_module, "refit", lambda *parts: given.extend(parts))
    learner.learn(TASKS[2])
    logits = 5 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    norms = torch.stack([logits[:, :3].norm(dim=1), logits[:, 3:].norm(dim=1)], 1)
    rows = torch.tensor([0, 1, 4, 2])
    expected = F.cross_entropy(logits / norms.mean(1, keepdim=True) / 0.1, rows)
    assert_close(given[3](logits, rows), expected)


def test_normalised_cross_entropy_as_written() -> None:
    logits = 5 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    task, rows = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 3, 5, 2])
    norms = torch.stack([logits[:, :2].norm(dim=1), logits[:, 2:5].norm(dim=1), logits[:, 5:].norm(dim=1)], 1)
    expected = F.cross_entropy(logits / norms.mean(1, keepdim=True) / 0.1, rows)
    assert_close(normalised_cross_entropy(logits, rows, task, 0.1), expected)
    assert_close(normalised_cross_entropy(7 * logits, rows, task, 0.1), expected)
    zeros = torch.zeros(2, 6, requires_grad=True)
    normalised_cross_entropy(zeros, rows[:2], task, 0.1).backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


def test_gaussians_take_the_bytes_that_the_manual_says() -> None:
    for name in ("sldc", "slca"):
        state = started(name, 2).method.state()
        stored = sum(x.numel() * x.element_size() for key, x in state.items() if key.startswith("gaussians"))
        assert stored == 5 * 4 * (32 + 1) ** 2


# -- both ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["sldc", "slca"])
def test_a_state_without_trained_heads_goes_on_from_the_refitted_ones(name: str) -> None:
    learner = started(name, 2)
    missing = ("gaussians.weight", "gaussians.bias")
    early = {key: x for key, x in state_of(learner).items() if key not in missing}
    assert len(early) == len(state_of(learner)) - 2
    other = started(name)
    other.method.load_state(early)
    heads = [torch.cat([h.weight for h in m.heads.tasks]) for m in (learner.method, other.method)]  # type: ignore[misc]
    assert torch.equal(*heads)
    assert torch.equal(other.method.state()["gaussians.weight"], heads[0])
