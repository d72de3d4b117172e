"""Learning rates over a task: what the optimiser has at every step, against the formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_tasks import small_config

from duallora.methods.schedules import rate_share
from duallora.methods.sora import SoRAConfig
from duallora.training import make_optimizer

PER_EPOCH = 3


def rates(schedule: Any, epochs: int) -> list[float]:
    """The rate of every step of a task, as the optimiser has it, over the rate of the configuration."""
    config = small_config("lora", schedule=schedule, epochs=epochs)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.5, 0.02)]
    optimizer, schedule = make_optimizer(groups, config, PER_EPOCH, epochs)
    found = []
    for _ in range(epochs * PER_EPOCH):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.04 * first), "every group falls alike"
        found.append(first / 0.5)
        optimizer.step()
        schedule.step()
    return found


def test_the_quarter_cosine_starts_one_epoch_late() -> None:
    """The counter of the released scheduler goes back by one after its first use."""
    epochs, counter, expected = 7, -1, []
    for epoch in range(epochs):
        if epoch > 0:
            counter += 1
        expected += [math.cos(99 * math.pi * max(counter, 0) / (200 * (epochs - 1)))] * PER_EPOCH
    assert rates("quarter-cosine", epochs) == pytest.approx(expected)
    assert expected[: 2 * PER_EPOCH] == [1.0] * 2 * PER_EPOCH and expected[2 * PER_EPOCH] < 1


@pytest.mark.parametrize(("epochs", "last", "mean"), [(50, 0.047, 0.66), (20, 0.097, 0.69), (5, 0.394, 0.81)])
def test_where_the_quarter_cosine_ends(epochs: int, last: float, mean: float) -> None:
    found = rates("quarter-cosine", epochs)
    assert found[-1] == pytest.approx(last, abs=5e-4)
    assert sum(found) / len(found) == pytest.approx(mean, abs=5e-3)


def test_a_single_epoch_has_the_full_rate() -> None:
    assert rates("quarter-cosine", 1) == rates("step", 1) == rates("constant", 1) == [1.0] * PER_EPOCH


@pytest.mark.parametrize(("epochs", "full"), [(50, 40), (5, 4), (10, 8), (4, 4), (7, 6)])
def test_steps_fall_to_a_tenth_for_the_last_fifth(epochs: int, full: int) -> None:
    falls = [0.1] * ((epochs - full) * PER_EPOCH)
    assert rates("step", epochs) == pytest.approx([1.0] * full * PER_EPOCH + falls)


def test_the_cosine_goes_to_zero_by_steps() -> None:
    steps = 4 * PER_EPOCH
    expected = [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert rates("cosine", 4) == pytest.approx(expected)
    assert [rate_share("cosine", step, steps, 4) for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "quarter-cosine", "step"])
def test_the_threshold_of_sora_has_the_rate_of_the_step(schedule: Any) -> None:
    from small_tasks import new_learner

    config = small_config("sora", schedule=schedule, epochs=5, sparsity=2.0)
    assert isinstance(config, SoRAConfig)
    method: Any = new_learner(config).method
    method.epochs = 5
    steps = method.steps = 5 * PER_EPOCH
    shares = [(step + 1) / steps * rate for step, rate in enumerate(rates(schedule, 5))]
    expected = [2.0 * config.learning_rate * share for share in shares]
    assert [method.threshold(step) for step in range(steps)] == pytest.approx(expected)
