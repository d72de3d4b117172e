"""SoRA: the proximal step, its schedule, exact zeros, and ranks that are dropped and opened again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from tiny import FAMILIES, tiny_backbone, tiny_images
from torch import Tensor

from duallora import ContinualLearner
from duallora.methods.sora import Gated, SoRA

DEPTH, RANK = 3, 8
SPARSE = {"rank": RANK, "sparsity": 30.0}  # closes about half of the gates in the few steps of a small task


def fresh(**changes: Any) -> tuple[ContinualLearner, SoRA]:
    learner = new_learner(small_config("sora", **{**SPARSE, **changes}), depth=DEPTH)
    assert isinstance(learner.method, SoRA)
    return learner, learner.method


def around_steps(method: SoRA, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Calls two functions around every proximal step."""
    step = method.after_step

    def stepped() -> None:
        before()
        step()
        after()

    method.after_step = stepped  # type: ignore[method-assign]


def proximal(g: Tensor, threshold: float) -> Tensor:
    return torch.sign(g) * torch.clamp(g.abs() - threshold, min=0)


def gated(rank: int = RANK, seed: int = 0) -> Gated:
    """A gated pair with a random B."""
    generator = torch.Generator().manual_seed(seed)
    update = Gated(32, 64)
    update.open(rank, generator)
    update.b.data.normal_(generator=generator)
    return update


def tokens() -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(9))


def ranks(learner: ContinualLearner) -> list[int]:
    return [len(x) for name, x in learner.method.state().items() if name.endswith(".g")]


def test_the_update_is_the_formula() -> None:
    update, x = gated(), tokens()
    expected = x.double() @ (update.a.double() @ torch.diag(update.g.double()) @ update.b.double())
    torch.testing.assert_close(update(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((x @ update.delta_weight()).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_proximal_map() -> None:
    update = gated(6)
    update.g.data = torch.tensor([0.5, -0.5, 0.15, -0.15, 0.05, -0.05])
    update.shrink(0.1)
    # Between one threshold and two a gate gets small, not zero.
    torch.testing.assert_close(update.g.data, torch.tensor([0.4, -0.4, 0.05, -0.05, 0.0, 0.0]))
    assert update.g.eq(0).tolist() == [False] * 4 + [True] * 2
    values = torch.linspace(-1, 1, 41)
    update.g.data = values.clone()
    update.shrink(0.33)
    torch.testing.assert_close(update.g.data, proximal(values, 0.33))


def test_each_step_is_the_proximal_map_of_what_the_optimiser_left() -> None:
    learner, method = fresh()
    steps: list[tuple[list[Tensor], list[Tensor]]] = []

    def gates() -> list[Tensor]:
        return [update.g.detach().clone() for update in method.updates]

    around_steps(method, lambda: steps.append((gates(), [])), lambda: steps[-1][1].extend(gates()))
    learner.learn(three_tasks()[1])
    assert len(steps) == 3  # 18 images in batches of 8
    adam = torch.optim.Adam([torch.zeros(1)], lr=learner.config.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=len(steps))
    for number, (before, after) in enumerate(steps):
        share = (number + 1) / len(steps)  # from dense to sparse
        threshold = SPARSE["sparsity"] * share * adam.param_groups[0]["lr"]
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a, proximal(b, threshold))
        adam.step()
        cosine.step()
    last = torch.cat(steps[-1][1])
    assert 0 < int(last.eq(0).sum()) < len(last)
    for (_, after), (before, _) in itertools.pairwise(steps):
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "Adam leaves it alone"


@pytest.mark.parametrize(("images", "epochs"), [(6, 1), (8, 3), (1, 2)])
def test_the_schedule_ends_with_the_task(images: int, epochs: int) -> None:
    learner, method = fresh(epochs=epochs)
    for task in (Patterns(["ant", "bee"], images), Patterns(["cat", "dog", "elk"], images)):
        learner.learn(task)
        assert method.step == method.steps == epochs * -(-len(task) // 8)
        full = SPARSE["sparsity"] * learner.config.learning_rate
        assert method.threshold(0) == pytest.approx(full / method.steps)


def test_dropping_closed_ranks_changes_no_output() -> None:
    update, x = gated(), tokens()
    update.g.data[[1, 4, 5]] = torch.tensor([0.0, -0.0, 0.0])
    kept = [0, 2, 3, 6, 7]
    whole, matrix, old = update(x), update.delta_weight(), [p.detach().clone() for p in update.parameters()]
    update.prune()
    assert (update.a.shape, update.g.shape, update.b.shape) == ((32, 5), (5,), (5, 64))
    assert torch.equal(update.a, old[0][:, kept]) and torch.equal(update.g, old[1][kept])
    assert torch.equal(update.b, old[2][kept])
    torch.testing.assert_close(update(x), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(update.delta_weight(), matrix, rtol=0, atol=1e-5)
    assert all(p.requires_grad and p.is_leaf for p in update.parameters())


def test_a_learned_task_keeps_no_closed_rank_and_answers_as_before() -> None:
    learner, method = fresh()
    trained: list[Tensor] = []
    images = tiny_images(4)

    def answer() -> None:
        with torch.no_grad():
            trained[:] = [method.extract(images), *(update.g.clone() for update in method.updates)]

    around_steps(method, lambda: None, answer)
    for task in three_tasks():
        learner.learn(task)
        features, *gates = trained
        torch.testing.assert_close(method.extract(images), features, rtol=0, atol=1e-5)
        for update, gate in zip(method.updates, gates, strict=True):
            assert torch.equal(update.g, gate[gate != 0])
            assert update.a.shape == (32, len(update.g)) and update.b.shape == (len(update.g), 64)
        assert any(len(update.g) < RANK for update in method.updates)
        stored = sum(x.numel() for name, x in method.state().items() if name.startswith("adapters"))
        assert stored == sum((32 + 1 + 64) * len(update.g) for update in method.updates)


def test_the_next_task_starts_with_all_ranks_and_the_same_output() -> None:
    learner, method = fresh()
    learner.learn(three_tasks()[0])
    images = tiny_images(4)
    features, kept = method.extract(images), [len(update.g) for update in method.updates]
    old = [[p.detach().clone() for p in update.parameters()] for update in method.updates]
    assert min(kept) < RANK
    opened: list[Tensor] = []
    groups = method.parameter_groups

    def noted() -> list[dict[str, Any]]:
        opened[:] = [method.extract(images).detach()]
        for update, k, (a, g, b) in zip(method.updates, kept, old, strict=True):
            assert len(update.g) == RANK and update.a.shape == (32, RANK) and update.b.shape == (RANK, 64)
            assert torch.equal(update.a[:, :k], a) and torch.equal(update.g[:k], g)
            assert torch.equal(update.b[:k], b)
            assert not update.b[k:].any() and update.g[k:].ne(0).all() and update.a[:, k:].any(0).all()
        return groups()

    method.parameter_groups = noted  # type: ignore[method-assign]
    learner.learn(three_tasks()[1])
    torch.testing.assert_close(opened[0], features, rtol=0, atol=1e-5)


def test_a_task_of_one_class_opens_nothing() -> None:
    learner, _ = fresh()
    learner.learn(three_tasks()[0])
    kept = ranks(learner)
    learner.learn(Patterns(["yak"], 4))
    assert ranks(learner) == kept and min(kept) < RANK


def test_pruned_shapes_are_saved_and_loaded(tmp_path: Path) -> None:
    tasks = three_tasks()
    learner, _ = fresh()
    for task in tasks[:2]:
        learner.learn(task)
    assert len({RANK, *ranks(learner)}) > 2, "layers that kept different numbers of ranks"
    loaded = reloaded(learner, tmp_path, depth=DEPTH)
    assert ranks(loaded) == ranks(learner)
    assert_same_state(loaded, learner)
    assert_same_outputs(loaded.outputs(unseen(tasks)), learner.outputs(unseen(tasks)))
    for each in (learner, loaded):
        each.learn(tasks[2])
    assert_same_state(loaded, learner)


def test_all_ranks_may_close(tmp_path: Path) -> None:
    learner, method = fresh(sparsity=1e4)
    for task in three_tasks():
        learner.learn(task)
        assert ranks(learner) == [0, 0]
        bare = tiny_backbone(depth=DEPTH)(tiny_images())
        torch.testing.assert_close(method.extract(tiny_images()), bare)
    data = unseen(three_tasks())
    assert_same_outputs(reloaded(learner, tmp_path, depth=DEPTH).outputs(data), learner.outputs(data))


def test_without_sparsity_no_rank_closes() -> None:
    learner, _ = fresh(sparsity=0.0)
    learner.learn(three_tasks()[0])
    assert ranks(learner) == [RANK, RANK]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    backbone = tiny_backbone(family)
    bare = backbone(tiny_images())
    learner = ContinualLearner(backbone, small_config("sora", sparsity=0.0), device="cpu")
    torch.testing.assert_close(learner.method.extract(tiny_images()), bare)
    learner.learn(three_tasks()[0])
    assert (learner.method.extract(tiny_images()) - bare).abs().max() > 1e-3
