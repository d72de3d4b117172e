"""Taking classes and tasks back: the others answer as if only those rows were gone, and learning goes on."""

from __future__ import annotations

import dataclasses
import errno
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
from tiny import tiny_backbone

from duallora import METHODS, ContinualLearner, DualLoRAError
from duallora.outputs import Outputs
from duallora.predictions import class_probabilities
from duallora.storage import checkpoint
from duallora.streams.task import as_task_dataset, concatenated
from duallora.teaching.take_back import relearned

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]

# The answer is the mean of two, each with the class or without it; or the class leaves a covariance of all.
MIXED = ("mos", "tuna", "lr-rgda")
SEVERAL = [name for name in METHODS if not METHODS[name].method.all_at_once]
MORE = Patterns(["hen", "ibex"], 6, 7)


def learned(name: str = "duallora", tasks: list[Patterns] | None = None, **changes: Any) -> ContinualLearner:
    learner = new_learner(small_config(name, **changes))
    parts = three_tasks() if tasks is None else tasks
    if METHODS[name].method.all_at_once:
        names = [c for task in parts for c in task.classes]
        parts = [concatenated([as_task_dataset(task) for task in parts], names)]  # type: ignore[list-item]
    for task in parts:
        learner.learn(task)
    return learner


def without(outputs: Outputs, rows: torch.Tensor, field: str) -> torch.Tensor:
    """Log-probabilities of the rows that stay, made to sum to one."""
    return getattr(outputs, field)[:, rows].log_softmax(1)


@pytest.mark.parametrize("name", METHODS)
def test_the_other_classes_answer_as_if_the_rows_were_gone(name: str) -> None:
    """A class that is not the last of its task takes nothing but its row and output along.

    Without a residual, whose gate has a row of the class as well. An image whose adapter was chosen by that
    class gets another one, and its features with it.
    """
    changes = {"residual": "none"} if name == "duallora" else {}
    learner, data = learned(name, **changes), unseen(three_tasks())
    before, chosen = learner.outputs(data), chosen_by(learner, data)
    forgotten = learner.forget(name="dog")
    after = learner.outputs(data)
    assert forgotten.classes == ("dog",) and forgotten.tasks == ()
    assert learner.classes == ["ant", "bee", "cat", "elk", "fox", "gnu"]
    stays = torch.tensor([i for i in range(7) if i != 3])
    assert torch.equal(after.row_task, before.row_task[stays])
    assert after.row_class.tolist() == list(range(6))
    same = chosen == chosen_by(learner, data)
    assert float(same.float().mean()) > 0.7
    torch.testing.assert_close(after.features[same], before.features[same])
    if name not in MIXED:
        expected = without(before, stays, "heads")[same].exp()
        torch.testing.assert_close(after.heads[same].exp(), expected, rtol=0, atol=2e-5)
    if name != "duallora":
        return
    # The calibrated readout joins a task posterior without the row and probabilities inside tasks.
    log_q = learner.method.rows.log_q(learner.method.extract(batch(learner, data)))
    posterior = learner.method.rows.by_task(log_q).exp()
    torch.testing.assert_close(after.task_posterior.exp(), posterior, rtol=0, atol=1e-5)


@torch.no_grad()
def chosen_by(learner: ContinualLearner, data: Patterns) -> torch.Tensor:
    """The task whose adapter acts on each image; 0 where all have the same."""
    chosen = learner.method.encode(batch(learner, data)).chosen
    return torch.zeros(len(data)) if chosen is None else chosen


def batch(learner: ContinualLearner, data: Patterns) -> torch.Tensor:
    return torch.stack([learner.preprocess(image) for image in data.images])


def test_the_class_rows_answer_as_if_the_row_were_gone() -> None:
    learner, data = learned("frozen"), unseen(three_tasks())
    features = learner.method.features(batch(learner, data)).detach()
    before, familiar = learner.method.rows.log_q(features), learner.method.rows.distance(features)[1]
    learner.forget(name="dog")
    stays = torch.tensor([0, 1, 2, 4, 5, 6])
    after = learner.method.rows.log_q(features)
    torch.testing.assert_close(after.exp(), before[:, stays].log_softmax(1).exp(), rtol=0, atol=1e-5)
    nearest = learner.method.rows.distance(features)[1]
    untouched = familiar != 3
    assert torch.equal(stays[nearest][untouched], familiar[untouched])


@pytest.mark.parametrize("which", ["task 1", "task 2", "task 3"])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_forgotten_task_leaves_a_model_that_goes_on(name: str, which: str, tmp_path: Path) -> None:
    learner, data = learned(name), unseen(three_tasks())
    index = int(which[-1]) - 1
    gone = three_tasks()[index].classes
    forgotten = learner.forget(task=which)
    assert forgotten.classes == tuple(gone) and forgotten.tasks == (which,)
    assert [task.forgotten for task in learner.tasks] == [t == index for t in range(3)]
    assert which not in [task.name for task in learner.tasks]
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_state(loaded, learner)
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))
    rest = [task for t, task in enumerate(three_tasks()) if t != index]
    evaluation = loaded.evaluate(unseen(rest))
    assert evaluation.tasks[index].images == 0 and sum(task.images for task in evaluation.tasks) == 3 * sum(
        len(task.classes) for task in rest
    )
    assert not {p.task for p in loaded.predict(data.images)} & {learner.tasks[index].name}
    assert not {p.label for p in loaded.predict(data.images)} & set(gone)
    with pytest.raises(DualLoRAError, match="the model has not learned"):
        loaded.evaluate(data)
    record = loaded.learn(MORE)
    learner.learn(MORE)
    assert record.classes == ("hen", "ibex") and record.name == "task 4"
    assert_same_state(loaded, learner)
    again = reloaded(loaded, tmp_path / "model")
    assert_same_outputs(again.outputs(data), loaded.outputs(data))
    outputs = again.outputs(unseen([*rest, MORE]))
    assert class_probabilities(outputs, outputs.readout).isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"residual": "own", "gate": "layer"}, {"gate": "off"}, {"rank": 20}])
def test_dual_lora_loses_what_is_the_tasks_own(changes: dict[str, object], tmp_path: Path) -> None:
    learner = learned(**changes)
    before = learner.method.state()
    learner.forget(task="task 2")
    after = learner.method.state()
    assert not [key for key in after if ".residual.1." in key]
    assert len([key for key in before if ".residual.1.psi" in key])
    assert not [key for key in after if key.endswith("fit.1")]
    dense = any(key.endswith(".dense") for key in before)
    assert dense == (changes.get("rank") == 20)
    for adapted in learner.method.adapted.values():
        for adapter in adapted.groups.values():
            assert 1 not in adapter.owners and (dense or len(adapter.owners) == 2)
    for key, value in after.items():
        if key.endswith((".phi", ".sizes", "scatter")):
            assert torch.equal(value, before[key]), key
    assert after["heads.tasks.1.weight"].shape[0] == 0
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_outputs(loaded.outputs(unseen(three_tasks())), learner.outputs(unseen(three_tasks())))


def test_an_update_of_a_model_that_does_not_say_whose_it_is_stays() -> None:
    learner = learned(energy_threshold=0.6)
    state = {k: v for k, v in learner.method.state().items() if not k.endswith("orthogonal.tasks")}
    old = new_learner(small_config(energy_threshold=0.6))
    old.method.load_state({key: value.clone() for key, value in state.items()})
    old.tasks, old.classes = list(learner.tasks), list(learner.classes)
    old.forget(task="task 2")
    kept = [key for key in state if ".orthogonal." in key]
    assert kept and all(torch.equal(old.method.state()[key], state[key]) for key in kept)


@pytest.mark.parametrize("calibration", ["class", "task"])
def test_relevance_by_energy_gives_a_forgotten_task_no_weight(calibration: str, tmp_path: Path) -> None:
    learner = learned(relevance="energy", calibration=calibration)
    learner.forget(task="task 1")
    outputs = learner.outputs(unseen(three_tasks()[1:]))
    assert outputs.gate is not None and not outputs.gate[:, 0].any() and outputs.gate[:, 1:].any()
    assert outputs.task_posterior[:, 0].exp().max() == 0
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_outputs(loaded.outputs(unseen(three_tasks()[1:])), outputs)
    loaded.learn(MORE)


@pytest.mark.parametrize("name", ["duallora", "frozen"])
def test_heads_to_come_are_seen_from_where_the_others_are(name: str) -> None:
    """The first task's mean is what linear classifiers are seen from; its loss must not set tasks apart."""
    learner, data = learned(name), unseen(three_tasks()[1:])
    before = learner.outputs(data)
    learner.forget(task="task 1")
    after = learner.outputs(data)
    assert learner.method.rows.tasks == 3
    if name == "frozen":  # features stay
        rows = torch.arange(2, 7)
        torch.testing.assert_close(after.heads.exp(), without(before, rows, "heads").exp(), rtol=0, atol=2e-5)
    else:
        assert after.heads.isfinite().all()


@pytest.mark.parametrize("name", ["duallora", "frozen"])
def test_heads_stay_where_they_are_beside_the_classifiers_of_rows(name: str) -> None:
    """Those are what the heads of later tasks begin as, so old and new logits go on being comparable."""
    learner = learned(name)
    method = learner.method

    def beside(task: int) -> list[torch.Tensor]:
        head, (weight, bias) = method.heads.tasks[task], method.rows.linear(task)
        return [head.weight - weight, head.bias - bias]

    kappa, before = method.rows.kappa, [beside(task) for task in (1, 2)]
    apart = method.rows.linear(1)[0]
    learner.forget(task="task 1")
    assert method.rows.kappa == kappa, "another temperature would scale the classifiers"
    assert (method.rows.linear(1)[0] - apart).abs().max() > 0.1, "they are seen from somewhere else now"
    for task, expected in zip((1, 2), before, strict=True):
        for found, wanted in zip(beside(task), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_task_that_is_named_after_its_classes_is_renamed() -> None:
    learner = new_learner(small_config("frozen"))
    for task, called in zip(
        three_tasks(), ("ant, bee", "cat, dog, elk 2", "Elk and the others"), strict=True
    ):
        learner.learn(task, name=called)
    assert learner.forget(name="bee").still_named == ()
    assert [task.name for task in learner.tasks[:2]] == ["ant", "cat, dog, elk 2"]
    learner.learn(Patterns(["hen", "cat", "dog"], 6, 7), name="cat, dog")
    forgotten = learner.forget(name="elk")
    assert [task.name for task in learner.tasks] == ["ant", "cat, dog 2", "Elk and the others", "cat, dog"]
    assert forgotten.still_named == ("Elk and the others",)
    assert learner.forget(name="gnu").still_named == ()


def test_a_previous_state_that_cannot_be_deleted_is_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned("frozen")
    folder = tmp_path / "model"
    learner.save(folder)
    old = folder / checkpoint.read_manifest(folder)["weights"]
    learner.forget(name="dog")
    learner.save(folder)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "not permitted", str(path))

    with checkpoint.exclusive(folder):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refuse)
            with pytest.raises(DualLoRAError, match=f"{old} could not be deleted: .* --purge` again"):
                checkpoint.purge(folder)
        assert old.exists()
        assert checkpoint.purge(folder) and not old.exists()
        assert not checkpoint.purge(folder)


def test_the_last_class_of_a_task_takes_the_task_along() -> None:
    learner = learned(tasks=[Patterns(["ant", "bee"], 6, 0), Patterns(["bee"], 6, 1, shift=40.0)])
    forgotten = learner.forget(name="bee")
    assert forgotten.classes == ("bee",) and forgotten.tasks == ("task 2",)
    assert [task.classes for task in learner.tasks] == [("ant",), ()]
    assert learner.tasks[0].train_images == 6 and learner.tasks[1].train_images == 0


def test_a_class_that_another_task_taught_too_is_still_known() -> None:
    learner = learned(tasks=[Patterns(["ant", "bee"], 6, 0), Patterns(["bee", "cat"], 6, 1)])
    forgotten = learner.forget(task="task 1")
    assert forgotten.classes == ("ant",) and learner.classes == ["bee", "cat"]
    assert learner.predict(Patterns(["bee"], 2).images)[0].task == "task 2"


def test_a_name_is_free_again() -> None:
    learner = learned()
    learner.forget(task="task 3")
    learner.learn(three_tasks()[2], name="task 3")
    assert learner.classes == ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
    assert learner.tasks[3].name == "task 3"
    learner.forget(task="task 3")
    assert [task.name for task in learner.tasks[2:]] == ["(forgotten 3)", "(forgotten 4)"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"task": "task 9"}, "no task named 'task 9'; it knows 'task 1', 'task 2'"),
        ({"name": "yak"}, "no class named 'yak'; it knows 'ant', 'bee'"),
    ],
)
def test_what_is_not_there_cannot_be_forgotten(asked: dict[str, str], sentence: str) -> None:
    learner = learned(tasks=three_tasks()[:2])
    with pytest.raises(DualLoRAError, match=sentence):
        learner.forget(**asked)


def test_all_that_a_model_knows_is_not_forgotten() -> None:
    learner = learned(tasks=[Patterns(["ant"], 6), Patterns(["bee"], 6)])
    learner.forget(name="ant")
    state = learner.method.state()
    for asked in ({"name": "bee"}, {"task": "task 2"}):
        with pytest.raises(DualLoRAError, match="all that the model knows; delete its folder"):
            learner.forget(**asked)
    assert all(torch.equal(state[key], value) for key, value in learner.method.state().items())
    with pytest.raises(DualLoRAError, match="no task named"):
        learner.forget(task="(forgotten 1)")


def test_undo_brings_it_back_until_it_is_purged(tmp_path: Path) -> None:
    learner, data = learned(), unseen(three_tasks())
    expected = learner.outputs(data)
    loaded = reloaded(learner, tmp_path / "model")
    loaded.forget(task="task 2")
    loaded.save(tmp_path / "model")
    checkpoint.undo(tmp_path / "model")
    back = ContinualLearner.load(tmp_path / "model", device="cpu", backbone=tiny_backbone())
    assert_same_outputs(back.outputs(data), expected)
    back.forget(task="task 2")
    back.save(tmp_path / "model")
    with checkpoint.exclusive(tmp_path / "model"):
        assert checkpoint.purge(tmp_path / "model")
        assert not checkpoint.purge(tmp_path / "model")
    files = [path.name for path in (tmp_path / "model").iterdir() if path.suffix == ".safetensors"]
    assert files == [checkpoint.read_manifest(tmp_path / "model")["weights"]]
    assert "task 2" not in (tmp_path / "model" / "model.json").read_text()
    with pytest.raises(DualLoRAError, match="nothing to undo"):
        checkpoint.undo(tmp_path / "model")


def test_how_well_a_class_could_be_relearned() -> None:
    """Patterns that the features tell apart are recognised, noise of one pattern under two names is not."""
    learner = learned()
    learner.forget(task="task 2")
    easy = relearned(learner, as_task_dataset(Patterns(["cat", "yak"], 8, 11)))
    assert easy.shape == (2,) and easy.mean() >= 0.9
    twins = Patterns(["cat", "yak"], 8, 11)
    noise = torch.Generator().manual_seed(0)
    twins.images = [torch.randint(0, 256, (3, 32, 32), generator=noise).byte() for _ in twins.images]
    assert relearned(learner, as_task_dataset(twins)).mean() < 0.8


def test_evaluation_and_records_survive_a_round_trip(tmp_path: Path) -> None:
    learner = learned()
    learner.forget(name="dog")
    loaded = reloaded(learner, tmp_path / "model")
    assert loaded.tasks == learner.tasks and loaded.classes == learner.classes
    assert loaded.tasks[1].train_images == 12
    assert dataclasses.asdict(loaded.evaluate(unseen(three_tasks()[:1]))) == dataclasses.asdict(
        learner.evaluate(unseen(three_tasks()[:1]))
    )
