"""CL-LoRA: what is shared, what is a task's own, the early exit, block weights, answers by prototypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import Patterns, exact_learner, small_config, three_tasks, unseen
from tiny import FAMILIES, WIDTH, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner
from duallora.adapters.shared_pairs import SharedPairs, TaskPairs
from duallora.methods import Batch, TaskInfo
from duallora.methods.cl_lora import CLLoRA

FOUR = Batch(tiny_images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))


def learned(tasks: int = 2, depth: int = 4, **changes: Any) -> tuple[ContinualLearner, CLLoRA]:
    config = small_config("cl-lora", first_adapted_layer=0, **changes)
    learner = exact_learner(config, depth=depth)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    assert isinstance(learner.method, CLLoRA)
    return learner, learner.method


def prepared(tasks: int = 2, classes: tuple[str, ...] = ("fox", "gnu"), **changes: Any) -> CLLoRA:
    """A method that stands before the training of a task."""
    _, method = learned(tasks, **changes)
    method.prepare(TaskInfo(tasks, "next", classes), lambda: iter(()))
    return method


def test_lower_layers_share_a_pair_and_upper_ones_have_one_a_task() -> None:
    _, method = learned(2)
    kinds = [type(b.update) for _, b in sorted(method.beside.items())]
    assert kinds == [SharedPairs, SharedPairs, TaskPairs, TaskPairs]
    assert [type(b.update) for b in learned(1, shared_layers=3)[1].beside.values()].count(SharedPairs) == 3
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = [b.base(x) for b in method.beside.values()]
    shared, own = method.beside[0], method.beside[3]
    for p, start in enumerate((0, 2 * WIDTH)):  # q and v
        columns = slice(start, start + WIDTH)
        a, b = shared.update.a[p], shared.update.b[p].detach()
        assert float(b.norm()) > 1e-3
        torch.testing.assert_close(shared(x)[..., columns], plain[0][..., columns] + x @ a @ b)
        for tasks in (1, torch.tensor([1, 0, 1])):
            with method._acting.holding(tasks):
                found = own(x)[..., columns]
            for i, task in enumerate([1, 1, 1] if isinstance(tasks, int) else tasks.tolist()):
                a, b, w = (each[task][p] for each in (own.update.a, own.update.b, own.update.weights))
                expected = plain[3][i][:, columns] + w * (x[i] @ a @ b)
                torch.testing.assert_close(found[i], expected)
    assert torch.equal(own(x), plain[3])  # outside of a pass no task's pair acts


def test_shared_down_projections_are_orthonormal_and_stay_as_they_were_drawn() -> None:
    _, method = learned(3)
    fresh = exact_learner(small_config("cl-lora", first_adapted_layer=0), depth=4).method
    assert isinstance(fresh, CLLoRA)
    assert len(method.shared) == 2
    for pairs, drawn in zip(method.shared, fresh.shared, strict=True):
        assert torch.equal(pairs.a, drawn.a) and not pairs.a.requires_grad
        torch.testing.assert_close(pairs.a.mT @ pairs.a, torch.eye(4).expand(2, 4, 4))
    trained = {id(p) for group in prepared().parameter_groups() for p in group["params"]}
    assert not trained & {id(p.a) for p in method.shared}
    for pairs in method.own:  # theirs begin orthonormal, and are trained
        assert float((pairs.a[2].mT @ pairs.a[2] - torch.eye(4)).abs().max()) > 1e-4


def test_the_new_task_trains_shared_up_projections_its_own_pairs_and_their_weights() -> None:
    method = prepared()
    method.loss(FOUR).backward()
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    # Two shared B, two own A, B and weights, each for q and v; the head's weight and its factor.
    own = 2 * (2 * 4 * (WIDTH + WIDTH) + 2)
    assert sum(p.numel() for p in trained) == 2 * 2 * 4 * WIDTH + own + 2 * WIDTH + 1
    for pairs in method.own:
        assert [p.requires_grad for p in pairs.weights] == [False, False, True]
        assert all(p.grad is None for p in (*pairs.a[:2], *pairs.b[:2], *pairs.weights[:2]))


def test_a_block_weights_gradient_is_that_of_a_factor_of_its_update() -> None:
    method = prepared(orthogonality=0.0)
    for pairs in method.own:
        pairs.b[-1].data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    weights = [pairs.weights[-1] for pairs in method.own]
    method.loss(FOUR).backward()
    step = 1e-2
    for weight in weights:
        for p in range(2):
            sides = []
            for sign in (1, -1):
                weight.data[p] += sign * step
                sides.append(float(method.loss(FOUR).detach()))
                weight.data[p] -= sign * step
            assert weight.grad is not None
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(weight.grad[p]) == pytest.approx(slope, rel=0.05, abs=2e-4)
    assert max(float(weight.grad.abs().max()) for weight in weights if weight.grad is not None) > 1e-3


def test_block_weights_of_different_tasks_are_kept_apart() -> None:
    method = prepared(2, orthogonality=7.0)
    rows = [torch.cat([pairs.weights[t] for pairs in method.own]).detach() for t in range(3)]
    expected = sum(abs(float(F.cosine_similarity(row, rows[2], dim=0))) for row in rows[:2]) / 2
    assert float(method._weights_cosine()) == pytest.approx(expected, rel=1e-5)
    with_term = float(method.loss(FOUR).detach())
    method.config = replace(method.config, orthogonality=0.0)
    assert with_term - float(method.loss(FOUR).detach()) == pytest.approx(7 * expected, rel=1e-4)


# -- the early exit ------------------------------------------------------------------------------------------


def exits(method: CLLoRA, images: Tensor) -> Tensor:
    """The class token after the two shared blocks and the final norm, written out."""
    model = method.backbone.model
    x = model._pos_embed(model.patch_embed(images))
    for layer in (0, 1):
        x = model.blocks[layer](x)
    final: Tensor = model.norm(x)[:, 0]
    return final


def test_the_exit_is_after_the_shared_blocks() -> None:
    _, method = learned(2)
    with torch.no_grad():
        found = method.backbone.early_exit(FOUR.images, 1)
        torch.testing.assert_close(found, exits(method, FOUR.images))
    assert found.shape == (4, method.backbone.feature_dim)


def test_the_early_exit_is_held_to_the_model_before_the_task() -> None:
    _, method = learned(2)
    with torch.no_grad():
        before = exits(method, FOUR.images)
    method.prepare(TaskInfo(2, "next", ("fox", "gnu")), lambda: iter(()))
    head = method.heads.tasks[-1].weight
    assert method._sigma is not None
    method._sigma.data.fill_(3.0)
    for pairs in method.shared:
        pairs.b.data.add_(0.05 * torch.randn(pairs.b.shape, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        after = exits(method, FOUR.images)
        new, old = (3 * F.normalize(f) @ F.normalize(head).T / 2 for f in (after, before))
        expected = F.cross_entropy(new, old.softmax(1))
    assert float((after - before).abs().max()) > 1e-2
    assert float(method._early_exit_loss(FOUR.images)) == pytest.approx(float(expected), rel=1e-5)
    total = float(method.loss(FOUR).detach())
    method.config = replace(method.config, distillation=0.0)
    assert total - float(method.loss(FOUR).detach()) == pytest.approx(5 * float(expected), rel=1e-4)
    assert all(wrapper.effective is None for wrapper in method.beside.values())


def test_gradients_of_the_exit_are_weighed_by_the_columns_of_b_before_the_task() -> None:
    method = prepared()
    norms = [pairs.b.detach().norm(dim=1) for pairs in method.shared]  # (P, d_out)
    shares = [n * n.shape[1] / n.sum(1, keepdim=True) for n in norms]
    assert all(float(s.std()) > 0.05 for s in shares), "the case says nothing"
    found = []
    for weighed in (True, False):
        if not weighed:
            for pairs in method.shared:
                pairs.weights = None
        for pairs in method.shared:
            pairs.b.grad = None
        method._early_exit_loss(2 * FOUR.images).backward()
        found.append([pairs.b.grad for pairs in method.shared])
    for with_shares, plain, share in zip(*found, shares, strict=True):
        assert plain is not None and float(plain.abs().max()) > 0
        torch.testing.assert_close(with_shares, share[:, None] * plain)


@pytest.mark.parametrize("taught", [0, 1])
def test_nothing_is_held_before_a_task_was_trained(taught: int) -> None:
    learner, method = learned(0)
    if taught:
        learner.learn(Patterns(["ant"], 3))
    method.prepare(TaskInfo(taught, "next", ("bee", "cat")), lambda: iter(()))
    assert not method._teacher and bool(method.loss(FOUR).isfinite())


# -- answers -------------------------------------------------------------------------------------------------


def test_a_row_answers_by_its_prototype_under_its_tasks_pairs() -> None:
    learner, method = learned(3)
    with torch.no_grad():
        answers_by_prototypes(learner, method)
    assert learner.forward_passes == 3


def answers_by_prototypes(learner: ContinualLearner, method: CLLoRA) -> None:
    data = unseen(three_tasks())
    images = torch.stack([learner.preprocess(image) for image in data.images])
    logits, chosen = [], []
    for task, patterns in enumerate(three_tasks()):
        with method._acting.holding(task):
            features = method.final(method.backbone(images))
            own = torch.stack([learner.preprocess(image) for image in patterns.images])
            of_task = method.final(method.backbone(own))
        if task == 2:  # an earlier prototype was made before the shared pairs moved
            labels = torch.tensor(patterns.targets)
            means = torch.stack([of_task[labels == k].mean(0) for k in range(len(patterns.classes))])
            torch.testing.assert_close(method.heads.tasks[2].weight, F.normalize(means))
        logits.append(20 * F.normalize(features) @ method.heads.tasks[task].weight.T)
        chosen.append(logits[-1].amax(1))
    encoding = method.encode(images)
    torch.testing.assert_close(method.head_logits(encoding), torch.cat(logits, 1), rtol=0, atol=1e-4)
    assert torch.equal(encoding.chosen, torch.stack(chosen).argmax(0))
    assert len(encoding.chosen.unique()) > 1


def test_a_forgotten_task_makes_no_pass() -> None:
    learner, method = learned(3)
    method.forget(1, torch.zeros(3, dtype=torch.bool))
    assert learner.forward_passes == 2
    outputs = learner.outputs(unseen(three_tasks()))
    assert outputs.heads.shape[1] == 4
    assert all(not p.any() for pairs in method.own for p in (pairs.a[1], pairs.b[1], pairs.weights[1]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """One shared layer and one of the tasks' own; the second task is held by the exit between them."""
    learner = exact_learner(small_config("cl-lora", first_adapted_layer=0), family=family)
    bare = learner.method.extract(tiny_images())
    for task in three_tasks()[:2]:
        learner.learn(task)
    assert isinstance(learner.method, CLLoRA) and len(learner.method.shared) == len(learner.method.own) == 1
    with torch.no_grad():
        found = learner.method.extract(tiny_images())
    assert found.shape == bare.shape and bool(found.isfinite().all())
    assert float((found - bare).abs().max()) > 1e-3
    assert learner.method.backbone.early_exit(tiny_images(), 0).shape == (3, learner.backbone.feature_dim)
