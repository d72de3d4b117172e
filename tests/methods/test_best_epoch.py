"""The epoch that names the most held-back images is kept, adapters and head exactly as they were."""

from __future__ import annotations

import pytest
import torch
from small_tasks import Patterns, new_learner, small_config, taught, three_tasks

from duallora import METHODS, training
from duallora.methods.best_epoch import BestEpoch


def noted(rights: list[int]) -> tuple[int, int, float]:
    """The epoch that is kept where so many images are right after each, and the parameter put back."""
    parameter = torch.zeros(1)
    best = BestEpoch([parameter], len(rights))
    for epoch, right in enumerate(rights, 1):
        parameter.fill_(epoch)
        best.note(epoch, right)
    return *best.restore(), float(parameter)


@pytest.mark.parametrize(
    ("rights", "kept"),
    [
        ([1, 2, 3], 3),
        ([1, 9, 3], 2),
        ([9, 4, 9, 5], 3),  # among equals the later one
        ([5, 5, 5], 3),
        ([4, 5, 4], 3),  # one image more is chance
        ([7], 1),
    ],
)
def test_the_best_epoch_is_put_back(rights, kept):
    assert noted(rights) == (kept, rights[kept - 1], float(kept))


@pytest.mark.parametrize("epochs", [1, 4, 10, 11, 25, 101])
def test_it_looks_at_most_ten_times_and_after_the_last_epoch(epochs):
    best = BestEpoch([], epochs)
    looks = [epoch for epoch in range(1, epochs + 1) if best.due(epoch)]
    assert looks[-1] == epochs and min(epochs, 5) <= len(looks) <= 10


def spoiled(monkeypatch, after):
    """Trained parameters are noted after each epoch, and those after epoch ``after`` are made worthless."""
    seen = []
    real = training._Judge.right

    def right(judge, method):
        parameters = [p for group in method.parameter_groups() for p in group["params"] if p.requires_grad]
        if len(seen) >= after:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.copy_(torch.randn_like(parameter) * 10)
        seen.append([p.detach().clone() for p in parameters])
        return real(judge, method)

    monkeypatch.setattr(training._Judge, "right", right)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_where_later_epochs_are_worse_an_earlier_one_is_kept(name, monkeypatch):
    learner = new_learner(small_config(name, epochs=4))
    seen = spoiled(monkeypatch, after=2)
    restored = []
    real = learner.method.consolidate

    def consolidate(task, loader):
        groups = learner.method.parameter_groups()
        restored.extend(p.detach().clone() for group in groups for p in group["params"] if p.requires_grad)
        real(task, loader)

    monkeypatch.setattr(learner.method, "consolidate", consolidate)
    (task,) = taught(name, three_tasks(10)[1:2])
    record = learner.learn(task, held_back=Patterns(["elk", "cat", "gnu", "dog"], 10, seed=50))
    if not record.trainable_parameters:
        assert (record.epochs, record.kept_epoch, record.kept_accuracy, record.kept_images) == (0, 0, None, 0)
        return
    assert record.epochs == 4 and record.kept_epoch in (1, 2)
    assert record.kept_images == 30  # gnu is of another task
    assert record.kept_accuracy > 0.4
    assert all(torch.equal(a, b) for a, b in zip(restored, seen[record.kept_epoch - 1], strict=True))


def test_looking_changes_nothing_where_the_last_epoch_is_kept():
    tasks = three_tasks(6)
    plain, judged = new_learner(small_config(epochs=2)), new_learner(small_config(epochs=2))
    plain.learn(tasks[0])
    record = judged.learn(tasks[0], held_back=Patterns(["ant", "bee"], 1, seed=50))
    assert record.kept_epoch == 2  # two images cannot say more than chance
    for name, value in plain.method.state().items():
        assert torch.equal(judged.method.state()[name], value), name


def test_images_of_no_class_of_the_task_choose_nothing():
    record = new_learner().learn(three_tasks()[0], held_back=Patterns(["yak"], 4))
    assert record.kept_accuracy is None and record.kept_epoch == record.epochs == 1
