"""The epoch that names the most held-back images is kept, adapters and head exactly as they were."""

from __future__ import annotations

import pytest
import torch
from small_tasks import EVERY_METHOD, Patterns, new_learner, small_config, taught, three_tasks

from duallora import training
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


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_where_later_epochs_are_worse_an_earlier_one_is_kept(name, monkeypatch):
    """So many images are said to be right after each epoch, and the parameters are noted there."""
    learner = new_learner(small_config(name, epochs=4))
    rights, seen, restored, real_right = iter([5, 20, 3, 4]), [], [], training._Judge.right

    def trained():
        groups = learner.method.parameter_groups()
        return [p.detach().clone() for group in groups for p in group["params"] if p.requires_grad]

    def right(judge, method):
        real_right(judge, method)
        seen.append(trained())
        return next(rights)

    monkeypatch.setattr(training._Judge, "right", right)
    real = learner.method.consolidate

    def consolidate(task, loader):
        restored.extend(trained())
        real(task, loader)

    monkeypatch.setattr(learner.method, "consolidate", consolidate)
    (task,) = taught(name, three_tasks(10)[1:2])
    record = learner.learn(task, held_back=Patterns(["elk", "cat", "gnu", "dog"], 10, seed=50))
    if not record.trainable_parameters:
        assert (record.epochs, record.kept_epoch, record.kept_accuracy, record.kept_images) == (0, 0, None, 0)
        return
    assert (record.epochs, record.kept_epoch) == (4, 2)
    assert (record.kept_accuracy, record.kept_images) == (20 / 30, 30)  # gnu is of another task
    assert all(torch.equal(a, b) for a, b in zip(restored, seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(restored, seen[3], strict=True))


def test_the_images_right_are_counted_by_the_head_that_is_trained(monkeypatch):
    learner, found = new_learner(small_config("lora")), []
    held = Patterns(["dog", "elk", "cat"], 4, seed=50)
    real = training._Judge.right

    def right(judge, method):
        images = torch.stack([learner.preprocess(image) for image in held.images])
        labels = torch.tensor([["cat", "dog", "elk"].index(held.classes[t]) for t in held.targets])
        logits = method.heads.tasks[-1](method.final(method.features(images)))
        found.append((int((logits.argmax(1) == labels).sum()), real(judge, method)))
        return found[-1][1]

    monkeypatch.setattr(training._Judge, "right", right)
    record = learner.learn(three_tasks()[1], held_back=held)
    assert found[0][0] == found[0][1] == round(record.kept_accuracy * 12)


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
