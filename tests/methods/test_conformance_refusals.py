"""What every registered method has to do when learning is interrupted or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_tasks import (
    EVERY_METHOD,
    Patterns,
    assert_same_outputs,
    assert_same_state,
    learned,
    new_learner,
    small_config,
    three_tasks,
    unseen,
)
from tiny import tiny_backbone

from duallora import METHODS, ContinualLearner, DualLoRAError

pytestmark = [
    pytest.mark.parametrize("name", EVERY_METHOD),
    pytest.mark.filterwarnings("ignore:.*no direction is left"),
]


class Interrupting(Patterns):
    """Counts how often it is read, and raises when it is read for the n-th time."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__(["yak", "zebu"], 6, 5)
        self.at, self.reads = at, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        if self.reads == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1 / 6, 1 / 2, 5 / 6])
def test_an_interrupted_learner_refuses_to_be_used(name: str, share: float, tmp_path: Path) -> None:
    whole = Interrupting()
    new_learner(small_config(name)).learn(whole)
    first = [] if METHODS[name].method.all_at_once else three_tasks()[:1]
    learner = learned(name, first)
    data = unseen(three_tasks()[:1])
    if first:
        learner.save(tmp_path / "model")
        expected = learner.outputs(data)
    with pytest.raises(KeyboardInterrupt):
        learner.learn(Interrupting(round(share * whole.reads)), name="wild")
    assert [task.name for task in learner.tasks] == ["task 1"] * len(first)
    for use in (
        lambda: learner.learn(three_tasks()[1]),
        lambda: learner.outputs(data),
        lambda: learner.evaluate(data),
        lambda: learner.predict(data.images),
        lambda: learner.save(tmp_path / "model"),
        lambda: learner.save(tmp_path / "other"),
    ):
        with pytest.raises(DualLoRAError, match="'wild' did not finish"):
            use()
    assert not (tmp_path / "other").exists()
    if not first:
        return
    loaded = ContinualLearner.load(tmp_path / "model", device="cpu", backbone=tiny_backbone())
    assert_same_outputs(loaded.outputs(data), expected)


def test_a_refused_task_leaves_the_learner_as_it_was(name: str) -> None:
    learner = learned(name, three_tasks()[:1])
    data = unseen(three_tasks()[:1])
    expected = learner.outputs(data)
    joint = METHODS[name].method.all_at_once
    gap = Patterns(["cat", "dog"], [4, 0])
    for refused, words in ((Patterns([], 0), "no images"), (gap, "'dog' has no images")):
        with pytest.raises(DualLoRAError, match=words):
            learner.learn(refused)
    with pytest.raises(DualLoRAError, match="'task 1' has been learned already"):
        learner.learn(three_tasks()[1], name="task 1")
    assert_same_outputs(learner.outputs(data), expected)
    if joint:
        with pytest.raises(DualLoRAError, match="all classes at once"):
            learner.learn(three_tasks()[1])
        assert_same_outputs(learner.outputs(data), expected)
        return
    learner.learn(three_tasks()[1])
    assert_same_state(learner, learned(name, three_tasks()[:2]))
