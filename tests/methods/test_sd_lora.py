"""SD-LoRA: directions and magnitudes, what is trained of them, and what happens between two tasks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_carried, new_learner, small_config, three_tasks, unseen
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch import Tensor

from duallora import ContinualLearner, DualLoRAError
from duallora.methods import Batch, TaskInfo
from duallora.methods.sd_lora import SDLoRA


def learned(tasks: int = 2, depth: int = 3, **changes: Any) -> tuple[ContinualLearner, SDLoRA]:
    learner = new_learner(small_config("sd-lora", **changes), depth=depth)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    assert isinstance(learner.method, SDLoRA)
    return learner, learner.method


def prepared(task: int = 2, classes: tuple[str, ...] = ("fox", "gnu"), **changes: Any) -> SDLoRA:
    """A method that stands before the training of a task."""
    _, method = learned(task, **changes)
    method.prepare(TaskInfo(task, "next", classes), lambda: iter(()))
    return method


def deltas(method: SDLoRA) -> list[Tensor]:
    return [pairs.delta_weight().detach().clone() for pairs in method.pairs]


@torch.no_grad()
def sizes(method: SDLoRA, task: int) -> Tensor:
    """``|A||B|`` of every layer and projection, written out."""
    return torch.tensor(
        [
            [
                float(pairs.a[task][p].square().sum().sqrt() * pairs.b[task][p].square().sum().sqrt())
                for p in range(2)
            ]
            for pairs in method.pairs
        ]
    )


def backward(method: SDLoRA) -> None:
    """Gradients of a step in which B is no longer zero, in fp32."""
    method.context = replace(method.context, autocast=nullcontext)
    for pairs in method.pairs:
        pairs.b[-1].data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    method.adapters.zero_grad()
    method.loss(Batch(tiny_images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))).backward()


def test_an_adapted_layer_equals_its_formula() -> None:
    learner, method = learned(3)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    for wrapper, pairs in zip(method.beside.values(), method.pairs, strict=True):
        expected = x.double() @ wrapper.base.weight.double().T + wrapper.base.bias.double()
        for i in range(3):
            for p, start in enumerate((0, 2 * WIDTH)):  # q and v
                update = (
                    float(method.magnitudes[i].detach()) * pairs.a[i][p].double() @ pairs.b[i][p].double()
                )
                assert float(update.detach().norm()) > 1e-3
                expected[..., start : start + WIDTH] += x.double() @ update
        torch.testing.assert_close(wrapper(x).double(), expected, rtol=0, atol=2e-5)  # merged
        wrapper.separate()
        torch.testing.assert_close(wrapper(x).double(), expected, rtol=0, atol=2e-5)
    assert learner.forward_passes == 1


def test_kept_magnitudes_take_the_norm_and_the_model_does_not_jump() -> None:
    learner, method = learned(2)
    before, raw, magnitudes = deltas(method), sizes(method, 1), [m.item() for m in method.magnitudes]
    data = unseen(three_tasks()[:2])
    images = torch.stack([learner.preprocess(image) for image in data.images])
    with torch.no_grad():
        features = method.extract(images)
    method.prepare(TaskInfo(2, "next", ("fox", "gnu")), lambda: iter(()))
    norm = float(raw.square().mean().sqrt())
    assert abs(norm - 1) > 1e-2 and abs(magnitudes[0] - 0.8) > 1e-3, "the case says nothing"
    torch.testing.assert_close(sizes(method, 1), raw / norm)
    for task in (0, 1):
        assert float(sizes(method, task).square().mean()) == pytest.approx(1, abs=1e-5)
    expected = [magnitudes[0], magnitudes[1] * norm, 0.8]
    assert [m.item() for m in method.magnitudes] == pytest.approx(expected, rel=1e-6)
    for after, delta in zip(deltas(method), before, strict=True):
        torch.testing.assert_close(after, delta, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(method.extract(images), features, rtol=0, atol=1e-4)


def test_reset_magnitudes_normalise_every_direction_by_itself_and_jump() -> None:
    _, method = learned(2, reset_magnitudes=True)
    before = deltas(method)
    assert max(abs(m.item() - 0.8) for m in method.magnitudes) > 1e-3
    method.prepare(TaskInfo(2, "next", ("fox", "gnu")), lambda: iter(()))
    assert [m.item() for m in method.magnitudes] == pytest.approx([0.8] * 3, abs=1e-7)
    for task in (0, 1):
        torch.testing.assert_close(sizes(method, task), torch.ones(2, 2))
    expected = 0.8 * torch.cat(
        [sum(method.pairs[0].a[i][p] @ method.pairs[0].b[i][p] for i in (0, 1)) for p in (0, 1)], 1
    )
    torch.testing.assert_close(deltas(method)[0], expected.detach())
    assert float((deltas(method)[0] - before[0]).norm() / before[0].norm()) > 0.05


@pytest.mark.parametrize("reset", [False, True])
def test_the_newest_pair_and_all_magnitudes_are_trained_and_nothing_else(reset: bool) -> None:
    method = prepared(reset_magnitudes=reset)
    backward(method)
    for pairs in method.pairs:
        for old in (*pairs.a[:2], *pairs.b[:2]):
            assert old.grad is None and not old.requires_grad
        assert float(pairs.a[2].grad.abs().max()) > 0 and float(pairs.b[2].grad.abs().max()) > 0
    for magnitude in method.magnitudes:
        assert magnitude.grad is not None and abs(float(magnitude.grad)) > 0
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    # Two layers, two projections, rank 4, a magnitude a task, and the head.
    assert sum(p.numel() for p in trained) == 2 * 2 * 4 * (WIDTH + WIDTH) + 3 + 2 * (WIDTH + 1)


def test_a_magnitude_learns_at_a_rate_in_proportion_to_its_size() -> None:
    """Else the first direction, whose norm its magnitude took over, would stand still beside a new one."""
    method, rate = prepared(), 2e-2
    method.magnitudes[0].data.fill_(4.0)
    groups = {id(p): group["lr"] for group in method.parameter_groups() for p in group["params"]}
    sizes_of = [float(m.detach()) for m in method.magnitudes]
    assert sizes_of[1] < 0.8 < sizes_of[0], "one above where magnitudes start, one below"
    for magnitude, size in zip(method.magnitudes, sizes_of, strict=True):
        assert groups[id(magnitude)] == pytest.approx(rate * max(size / 0.8, 1.0))
    assert groups[id(method.pairs[0].b[-1])] == rate


def test_a_magnitude_is_one_number_for_all_layers() -> None:
    """Its gradient is the sum over layers of ``<dL/d(delta), A B>``."""
    method = prepared()
    captured: list[Tensor] = []
    for pairs in method.pairs:

        def watched(pairs: Any = pairs, original: Any = pairs.delta_weight) -> Tensor:
            delta = original()
            delta.retain_grad()
            captured.append(delta)
            return delta

        pairs.delta_weight = watched
    backward(method)
    assert len(captured) == 2
    for i, magnitude in enumerate(method.magnitudes):
        products = [torch.cat([pairs.a[i][p] @ pairs.b[i][p] for p in (0, 1)], 1) for pairs in method.pairs]
        expected = sum((delta.grad * ab).sum() for delta, ab in zip(captured, products, strict=True))
        assert magnitude.grad.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert [name for name, _ in method.adapters.named_parameters() if "magnitudes" in name] == [
        f"magnitudes.{i}" for i in range(3)
    ]


@pytest.mark.parametrize("reset", [False, True])
def test_training_moves_magnitudes_and_leaves_directions(reset: bool) -> None:
    learner, method = learned(1, reset_magnitudes=reset)
    seen: list[tuple[Tensor, ...]] = []
    prepare = method.prepare

    def watched(task: TaskInfo, loader: Any) -> None:
        prepare(task, loader)
        seen.append(tuple(x.detach().clone() for p in method.pairs for x in (p.a[0], p.b[0])))

    method.prepare = watched  # type: ignore[method-assign]
    start = float(sizes(method, 0).square().mean().sqrt()) * method.magnitudes[0].item()
    learner.learn(three_tasks()[1])
    for now, then in zip((x for p in method.pairs for x in (p.a[0], p.b[0])), seen[0], strict=True):
        assert torch.equal(now, then)
    assert abs(method.magnitudes[0].item() - (0.8 if reset else start)) > 1e-3


@pytest.mark.parametrize("reset", [False, True])
def test_a_direction_stays_the_same_to_the_bit_once_it_is_one(reset: bool) -> None:
    learner, method = learned(2, reset_magnitudes=reset)
    before = [x.detach().clone() for pairs in method.pairs for x in (pairs.a[0], pairs.b[0])]
    learner.learn(three_tasks()[2])
    for x, then in zip((x for p in method.pairs for x in (p.a[0], p.b[0])), before, strict=True):
        assert torch.equal(x, then)


@pytest.mark.parametrize("reset", [False, True])
def test_a_place_that_learned_nothing_stays_zero(reset: bool) -> None:
    _, method = learned(1, reset_magnitudes=reset)
    method.pairs[0].b[0].data[1] = 0.0
    expected = sizes(method, 0) / (sizes(method, 0).square().mean().sqrt() if not reset else sizes(method, 0))
    method.prepare(TaskInfo(1, "next", ("fox", "gnu")), lambda: iter(()))
    torch.testing.assert_close(sizes(method, 0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("reset", [False, True])
def test_a_single_class_adds_exactly_nothing(reset: bool) -> None:
    learner, method = learned(2, reset_magnitudes=reset)
    data = unseen(three_tasks()[:2])
    features, magnitudes = learner.outputs(data).features, [m.item() for m in method.magnitudes]
    learner.learn(Patterns(["hen"], 5))
    assert [m.item() for m in method.magnitudes[:2]] == magnitudes
    assert all(not pairs.b[2].any() for pairs in method.pairs)
    # Up to rounding: the products of all pairs are one product, which the zeros make longer.
    torch.testing.assert_close(learner.outputs(data).features, features, rtol=0, atol=1e-5)
    raw, before = sizes(method, 1), deltas(method)
    method.prepare(TaskInfo(3, "next", ("yak", "zebu")), lambda: iter(()))
    # The pair before the single class is the one that becomes a direction now; the zero pair stays zero.
    norm = raw if reset else raw.square().mean().sqrt().expand(2, 2)
    torch.testing.assert_close(sizes(method, 1), raw / norm)
    assert all(not pairs.b[2].any() and pairs.b[2].isfinite().all() for pairs in method.pairs)
    assert reset or torch.allclose(deltas(method)[0], before[0], atol=1e-6)
    backward(method)
    assert float(method.magnitudes[2].grad) == 0.0


def test_first_tasks_of_a_single_class_leave_nothing_to_normalise() -> None:
    learner = new_learner(small_config("sd-lora"))
    for task in (Patterns(["hen"], 3), Patterns(["ibis"], 3), three_tasks()[0]):
        learner.learn(task)
    assert all(bool(x.isfinite().all()) for x in learner.method.state().values())
    assert learner.tasks[-1].orthogonal_norm > 0


def test_rank_reduction_follows_the_schedule() -> None:
    for rank, expected in ((10, [10] * 4 + [8] * 4 + [6] * 2), (4, [4] * 4 + [4] * 4 + [3] * 2)):
        method = SDLoRA(tiny_backbone(), small_config("sd-lora", rank=rank, rank_reduction=True), 0)
        for task in range(10):
            method.grow(task)
        assert [a.shape[2] for a in method.pairs[0].a] == expected
    constant = SDLoRA(tiny_backbone(), small_config("sd-lora"), 0)
    for task in range(9):
        constant.grow(task)
    assert [a.shape[2] for a in constant.pairs[0].a] == [4] * 9


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_carry_it(family: str) -> None:
    assert_carried("sd-lora", family)


def test_a_magnitude_of_zero_could_never_learn() -> None:
    with pytest.raises(DualLoRAError, match="magnitude must be above 0"):
        small_config("sd-lora", magnitude=0.0)


@pytest.mark.parametrize(("optimizer", "expected"), [("adam", 5.0), ("adamw", 5.0), ("sgd", 1.0)])
def test_rates_follow_the_magnitudes_only_where_steps_do_not(optimizer: str, expected: float) -> None:
    """Steps of SGD grow with the gradient; those of Adam have to be told how large a magnitude is."""
    config = small_config("sd-lora", optimizer=optimizer)
    method = SDLoRA(tiny_backbone(), config, 0)
    method.heads.open(2, method.generator(0))
    method.grow(0)
    with torch.no_grad():
        method.magnitudes[0].fill_(5 * config.magnitude)
    rates = [group["lr"] for group in method.parameter_groups()[2:]]
    assert rates[0] == pytest.approx(expected * config.learning_rate)
