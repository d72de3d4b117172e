"""Heads, and the calibration of their logits against a loop over images, tasks and rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.calibration import calibrate
from duallora.classifiers.heads import Heads
from duallora.classifiers.log_probabilities import sum_rows, within_tasks

CPU = torch.device("cpu")


def example(sizes: list[int], images: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, log q over rows, log p(t|f) and the task of every row."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    row_task = torch.tensor([t for t, size in enumerate(sizes) for _ in range(size)])
    logits = 2 * torch.randn(images, rows, generator=generator)
    log_q = (2 * torch.randn(images, rows, generator=generator)).log_softmax(1)
    return logits, log_q, sum_rows(log_q, row_task, len(sizes)), row_task


def log_softmax_of(values: list[float]) -> list[float]:
    peak = max(values)
    total = peak + math.log(sum(math.exp(v - peak) for v in values))
    return [v - total for v in values]


def naive(logits: Tensor, log_q: Tensor, log_task: Tensor, sizes: list[int], kind: str, tau: float) -> Tensor:
    result = []
    for i in range(len(logits)):
        row, first = [], 0
        for task, size in enumerate(sizes):
            head = log_softmax_of(logits[i, first : first + size].tolist())
            if kind == "class":
                mixed = [0.5 * head[c] + 0.5 * float(log_q[i, first + c]) for c in range(size)]
                row += [float(log_task[i, task]) + value for value in log_softmax_of(mixed)]
            else:
                row += [value + tau * float(log_task[i, task]) for value in head]
            first += size
        result.append(row if kind == "class" else log_softmax_of(row))
    return torch.tensor(result)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    kind=st.sampled_from(["class", "task"]),
    tau=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_calibration_equals_a_loop_over_rows(sizes: list[int], kind: str, tau: float, seed: int) -> None:
    logits, log_q, log_task, row_task = example(sizes, seed=seed)
    found = calibrate(logits, log_q, log_task, row_task, kind, tau)
    assert_close(found, naive(logits, log_q, log_task, sizes, kind, tau), rtol=1e-4, atol=1e-4)
    assert_close(found.exp().sum(1), torch.ones(5), rtol=1e-4, atol=1e-5)


def test_calibration_by_class_keeps_the_posterior_over_tasks() -> None:
    logits, log_q, log_task, row_task = example([3, 2, 4])
    found = calibrate(logits, log_q, log_task, row_task, "class", 1.0)
    assert_close(sum_rows(found, row_task, 3), log_task, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["class", "task"])
def test_a_head_cannot_gain_by_shouting(kind: str) -> None:
    """A constant on one head's logits says nothing about its classes, so the answer must not change."""
    logits, log_q, log_task, row_task = example([3, 2])
    louder = logits + 50.0 * (row_task == 1)
    before = calibrate(logits, log_q, log_task, row_task, kind, 1.0)
    assert_close(calibrate(louder, log_q, log_task, row_task, kind, 1.0), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["class", "task"])
@pytest.mark.parametrize("far", [-300.0, -5000.0])
def test_a_task_that_is_out_of_the_question_gives_no_nan(kind: str, far: float) -> None:
    logits, log_q, _, row_task = example([2, 3])
    log_q = (log_q + far * (row_task == 1)).log_softmax(1)
    log_task = sum_rows(log_q, row_task, 2)
    found = calibrate(logits, log_q, log_task, row_task, kind, 1.0)
    assert bool(torch.isfinite(found).all())
    assert_close(found.exp().sum(1), torch.ones(5), rtol=1e-4, atol=1e-5)
    assert_close(found, naive(logits, log_q, log_task, [2, 3], kind, 1.0), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_an_impossible_task_has_no_probability_and_gives_no_nan(tau: float) -> None:
    """A posterior by energy is -inf for a task without a basis; with tau = 0 that says nothing."""
    logits, log_q, _, row_task = example([2, 3])
    log_task = torch.tensor([[0.0, -math.inf]]).expand(5, 2)
    found = calibrate(logits, log_q, log_task, row_task, "task", tau)
    assert not bool(torch.isnan(found).any())
    assert_close(found.exp().sum(1), torch.ones(5), rtol=1e-4, atol=1e-5)


def test_within_tasks_normalises_each_task_alone() -> None:
    logits, _, _, row_task = example([3, 1, 2])
    found = within_tasks(logits, row_task, 3)
    parts = [part.log_softmax(1) for part in logits.split([3, 1, 2], 1)]
    assert_close(found, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


def test_a_new_head_freezes_the_earlier_ones() -> None:
    heads = Heads(6, CPU)
    heads.open(3, torch.Generator().manual_seed(0))
    heads.open(2, torch.Generator().manual_seed(1))
    assert not any(p.requires_grad for p in heads.tasks[0].parameters())
    assert all(p.requires_grad for p in heads.tasks[1].parameters())
    f = torch.randn(4, 6)
    heads(f).sum().backward()
    assert heads.tasks[0].weight.grad is None and heads.tasks[1].weight.grad is not None


def test_heads_lie_side_by_side_in_the_order_of_the_tasks() -> None:
    heads, f = Heads(6, CPU), torch.randn(4, 6)
    for task, classes in enumerate([3, 1, 2]):
        heads.open(classes, torch.Generator().manual_seed(task))
    expected = torch.cat([f @ head.weight.T + head.bias for head in heads.tasks], 1)
    assert_close(heads(f), expected, rtol=1e-5, atol=1e-5)
    assert_close(heads.current(f), expected[:, 4:], rtol=1e-5, atol=1e-5)


def test_heads_read_the_first_columns_alone() -> None:
    heads, f = Heads(6, CPU), torch.randn(4, 9, requires_grad=True)
    for task, classes in enumerate([3, 2]):
        heads.open(classes, torch.Generator().manual_seed(task))
    assert torch.equal(heads(f), heads(f[:, :6])) and torch.equal(heads.current(f), heads.current(f[:, :6]))
    heads(f).square().sum().backward()
    assert f.grad is not None and not f.grad[:, 6:].any()
    assert float(f.grad[:, :6].abs().min()) > 0


def test_a_head_is_drawn_from_its_generator_alone() -> None:
    torch.manual_seed(0)
    first, second, other = Heads(6, CPU), Heads(6, CPU), Heads(6, CPU)
    first.open(3, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    second.open(3, torch.Generator().manual_seed(5))
    other.open(3, torch.Generator().manual_seed(6))
    assert torch.equal(first.tasks[0].weight, second.tasks[0].weight)
    assert not torch.equal(first.tasks[0].weight, other.tasks[0].weight)
    assert float(first.tasks[0].weight.detach().abs().max()) <= 6**-0.5 and not bool(
        first.tasks[0].bias.any()
    )


def test_state_restores_heads_of_unequal_size_frozen() -> None:
    heads, other, f = Heads(6, CPU), Heads(6, CPU), torch.randn(4, 6)
    for task in range(12):
        heads.open(1 + task % 3, torch.Generator().manual_seed(task))
    other.load_state_dict({name: x.clone() for name, x in heads.state_dict().items()})
    assert torch.equal(other(f), heads(f))
    assert not any(p.requires_grad for p in other.parameters())
