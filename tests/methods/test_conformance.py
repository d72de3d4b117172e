"""What every registered method has to do, on a random ViT of two layers and 32 dimensions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
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
    timeless,
    unseen,
)
from tiny import tiny_backbone

from duallora import METHODS, ContinualLearner, DualLoRAError, load_backbone
from duallora.adapters.wrapped_qkv import unwrap_attention
from duallora.outputs import Outputs
from duallora.predictions import class_probabilities
from duallora.streams.task import TaskDataset, as_task_dataset, concatenated

pytestmark = [
    pytest.mark.parametrize("name", METHODS),
    pytest.mark.filterwarnings("ignore:.*no direction is left"),
]

UNTRAINED = {"ncm", "ranpac"}  # nothing takes gradients
REFITTED = {"slca", "sldc"}  # the heads of earlier tasks are trained again
MOVED = {"sldc"}  # rows of earlier tasks follow the drift of the features

REPEATED = [
    Patterns(["ant", "bee"], 6, 0),
    Patterns(["cat", "bee", "ant"], 6, 1, shift=60.0),
    Patterns(["bee"], 5, 2, shift=-60.0),
]


def taught(name: str, tasks: Sequence[Patterns]) -> list[Patterns | TaskDataset]:
    """The tasks as the method takes them: joint training has all their images in one."""
    if not METHODS[name].method.all_at_once or len(tasks) < 2:
        return list(tasks)
    names = list(dict.fromkeys(c for task in tasks for c in task.classes))
    return [concatenated([as_task_dataset(task) for task in tasks], names)]


def learned(
    name: str, tasks: list[Patterns] | None = None, seed: int = 0, **changes: Any
) -> ContinualLearner:
    learner = new_learner(small_config(name, **changes), seed)
    for task in taught(name, three_tasks() if tasks is None else tasks):
        learner.learn(task)
    return learner


def test_a_saved_learner_predicts_the_same(name: str, tmp_path: Path) -> None:
    learner = learned(name)
    data = unseen(three_tasks())
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_state(loaded, learner)
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))
    assert loaded.tasks == learner.tasks and loaded.config == learner.config
    assert loaded.predict(data.images[:5]) == learner.predict(data.images[:5])


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_learner_learns_the_same(name: str, after: int, tmp_path: Path) -> None:
    whole, tasks = learned(name), taught(name, three_tasks())
    parts = new_learner(small_config(name))
    for task in tasks[:after]:
        parts.learn(task)
    parts = reloaded(parts, tmp_path / "model")
    for task in tasks[after:]:
        parts.learn(task)
    assert_same_state(parts, whole)
    assert_same_outputs(parts.outputs(unseen(three_tasks())), whole.outputs(unseen(three_tasks())))


def test_evaluating_between_tasks_changes_nothing(name: str) -> None:
    learner = new_learner(small_config(name))
    for task in taught(name, three_tasks()):
        learner.learn(task)
        learner.evaluate(task)
        learner.predict([task[i][0] for i in range(3)])
    assert_same_state(learner, learned(name))


def test_two_equal_runs_are_equal(name: str) -> None:
    assert_same_state(learned(name), learned(name))


def test_the_seed_counts(name: str) -> None:
    first, second = (learned(name, seed=seed).outputs(three_tasks()[0]).heads for seed in (0, 1))
    # Class means of frozen features are all that NCM has: nothing is drawn.
    assert torch.equal(first, second) == (name == "ncm")


@pytest.mark.parametrize("size", [1, 7, 128])
def test_predictions_do_not_depend_on_the_batch(name: str, size: int) -> None:
    learner = learned(name)
    data = unseen(three_tasks(), 6)
    images = torch.stack([learner.preprocess(image) for image in data.images])
    expected = learner.outputs(data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    found = learner.outputs_of(images[order].split(size))
    for field in ("heads", "calibrated", "task_posterior", "familiarity", "gate", "features"):
        a, b = getattr(found, field), getattr(expected, field)
        assert (a is None) == (b is None)
        if a is not None:
            # Probabilities: the logs of what is all but impossible magnify the last bit.
            a, b = (x.exp() if field in ("heads", "calibrated", "task_posterior") else x for x in (a, b))
            torch.testing.assert_close(a, b[order], rtol=0, atol=1e-5, msg=field)


def test_probabilities_are_probabilities(name: str) -> None:
    outputs = learned(name).outputs(unseen(three_tasks()))
    ones = torch.ones(len(outputs.heads))
    for rows in (outputs.heads, outputs.calibrated, outputs.task_posterior):
        assert rows is not None
        torch.testing.assert_close(rows.exp().sum(1), ones)
    assert outputs.familiarity is not None
    assert float(outputs.familiarity.min()) >= 0 and float(outputs.familiarity.max()) <= 1
    if outputs.gate is not None:
        assert float(outputs.gate.min()) >= 0 and float(outputs.gate.max()) <= 1


def test_the_tasks_are_learned(name: str) -> None:
    tasks = three_tasks(10)
    learner = learned(name, tasks, epochs=4)
    # By chance one in seven; sequential LoRA forgets, but not the task it has just learned.
    assert learner.evaluate(Patterns(tasks[-1].classes, 10, seed=50)).accuracy > 2 / 7


@pytest.mark.parametrize("real", [False, True])
def test_the_backbone_stays_as_it_was(name: str, real: bool) -> None:
    backbone = load_backbone() if real else tiny_backbone()
    originals = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    assert not real or any("running_mean" in key for key in originals)
    copies = {key: tensor.detach().clone() for key, tensor in originals.items()}
    learner = ContinualLearner(backbone, small_config(name, batch_size=4), device="cpu")
    for task in taught(name, three_tasks(2)[: 1 if real else 3]):
        learner.learn(task)
        learner.evaluate(task)
    for key, tensor in originals.items():
        assert torch.equal(tensor, copies[key]), key
        assert not tensor.requires_grad and tensor.grad is None, key
    unwrap_attention(learner.backbone)
    after = learner.backbone.state_dict()
    assert after.keys() == originals.keys()
    for key, tensor in after.items():  # the very tensors, so nothing else took their place
        assert tensor.data_ptr() == originals[key].data_ptr(), key


@pytest.mark.parametrize(
    "tasks",
    [
        [Patterns(["ant", "bee", "cat", "dog"], [9, 1, 4, 2]), Patterns(["elk", "fox"], [2, 17])],
        [Patterns(["ant"], 5), Patterns(["bee", "cat"], 5), Patterns(["dog"], 4), Patterns(["elk"], 3)],
        [Patterns(["ant", "bee"], 1), Patterns(["cat"], 1), Patterns(["dog", "elk", "fox"], 1)],
        [Patterns(["ant"], 1), Patterns(["ant"], 1)],
        REPEATED,
    ],
    ids=["unequal", "single classes", "single images", "one image twice", "repeated classes"],
)
def test_tasks_of_any_shape(name: str, tasks: list[Patterns], tmp_path: Path) -> None:
    learner = learned(name, tasks)
    data = unseen(tasks)
    outputs = learner.outputs(data)
    given = taught(name, tasks)
    assert outputs.heads.shape == (len(data), sum(len(task.classes) for task in given))
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_outputs(loaded.outputs(data), outputs)  # which refuses NaN
    resumed = new_learner(small_config(name))
    resumed.learn(given[0])
    resumed = reloaded(resumed, tmp_path / "first")
    for task in given[1:]:
        resumed.learn(task)
    assert_same_state(resumed, learner)
    for record, task in zip(learner.tasks, given, strict=True):
        trained = len(task.classes) > 1 and name not in UNTRAINED
        assert (record.trainable_parameters > 0) == trained
        for norm in (record.orthogonal_norm, record.residual_norm):
            assert norm is None or (trained and math.isfinite(norm) and norm > 0)


def test_a_repeated_class_adds_up_and_overwrites_nothing(name: str) -> None:
    learner = new_learner(small_config(name))
    heads: list[dict[str, torch.Tensor]] = []
    for task in taught(name, REPEATED):
        learner.learn(task)
        state = learner.method.state()
        heads.append({key: x.clone() for key, x in state.items() if key.startswith("heads.")})
    for earlier in heads[:-1]:
        for key, x in earlier.items():
            assert torch.equal(heads[-1][key], x) or name in REFITTED, key
    assert learner.classes == ["ant", "bee", "cat"]
    outputs = learner.outputs(REPEATED[1])
    if METHODS[name].method.all_at_once:
        assert outputs.row_class.tolist() == [0, 1, 2]
        return
    assert outputs.row_class.tolist() == [0, 1, 2, 1, 0, 1]
    assert outputs.row_task.tolist() == [0, 0, 1, 1, 1, 2]
    rows = (outputs.heads if outputs.readout == "heads" else outputs.calibrated).double().exp()
    bee = rows[:, 1] + rows[:, 3] + rows[:, 5]
    torch.testing.assert_close(class_probabilities(outputs, outputs.readout)[:, 1], bee)
    found = learner.predict(REPEATED[1].images, top=3)
    assert [dict(p.top)["bee"] for p in found] == pytest.approx(bee.tolist(), abs=1e-6)


def test_earlier_rows_stay(name: str) -> None:
    """Counts and means of earlier rows on the final feature are not touched by later tasks."""
    learner = new_learner(small_config(name))
    given = taught(name, REPEATED)
    learner.learn(given[0])
    before = {k: x.clone() for k, x in learner.method.state().items() if k in ("rows.count", "rows.mean")}
    for task in given[1:]:
        learner.learn(task)
    after = learner.method.state()
    assert after["rows.count"].tolist() == ([12, 17, 6] if len(given) == 1 else [6, 6, 6, 6, 6, 5])
    for key, x in before.items():
        moved = name in MOVED and key == "rows.mean"
        assert torch.equal(after[key][: len(x)], x) != moved, key


def test_global_random_numbers_have_no_part(name: str) -> None:
    def seeded(seed: int) -> ContinualLearner:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return learned(name)

    assert_same_state(seeded(1), seeded(2))


def test_global_random_numbers_are_not_disturbed(name: str, tmp_path: Path) -> None:
    backbone, copy = tiny_backbone(), tiny_backbone()
    tasks = three_tasks()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    learner = ContinualLearner(backbone, small_config(name), device="cpu")
    for task in taught(name, tasks):
        learner.learn(task)
    learner.evaluate(tasks[0])
    learner.save(tmp_path / "model")
    ContinualLearner.load(tmp_path / "model", device="cpu", backbone=copy).predict(tasks[0].images)
    assert random.getstate() == states[2]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])


def reachable(root: object) -> Iterator[tuple[str, torch.Tensor | np.ndarray]]:
    """All tensors and arrays an object holds, directly or through attributes, containers and closures."""
    seen: set[int] = set()
    stack: list[tuple[str, object]] = [("learner", root)]
    while stack:
        path, item = stack.pop()
        if id(item) in seen or isinstance(item, (type, str, bytes, int, float, type(np), type(None))):
            continue
        seen.add(id(item))
        if isinstance(item, (torch.Tensor, np.ndarray)):
            yield path, item
            if isinstance(item, torch.Tensor) and item.is_leaf and item.grad is not None:
                yield f"{path}.grad", item.grad
        elif isinstance(item, dict):
            stack += [(f"{path}[{key!r}]", value) for key, value in item.items()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += [(f"{path}[{i}]", value) for i, value in enumerate(item)]
        elif isinstance(item, FunctionType):
            stack += [(f"{path}.<closure>", cell.cell_contents) for cell in item.__closure__ or ()]
            stack += [(f"{path}.<defaults>", value) for value in item.__defaults__ or ()]
        elif isinstance(item, MethodType):
            stack.append((f"{path}.<self>", item.__self__))
        elif isinstance(item, partial):
            stack += [(f"{path}.<partial>", [item.func, item.args, item.keywords])]
        else:
            names = [*getattr(item, "__dict__", {}), *getattr(type(item), "__slots__", ())]
            stack += [(f"{path}.{key}", getattr(item, key)) for key in names if hasattr(item, key)]


def test_nothing_of_the_images_is_kept(name: str) -> None:
    first, second = Patterns(["ant", "bee", "cat"], [41, 40, 40], 0), Patterns(["dog", "elk"], [40, 37], 1)
    learner = new_learner(small_config(name))
    given = taught(name, (first, second))
    for task in given:
        learner.learn(task)
    # All images of a task, its last evaluation batch of 64, its last training batch of 8.
    sizes = {size for task in given for size in (len(task), len(task) - 64, len(task) - 128)}
    assert not sizes & {32, 48, 64, 96, 128}, "sizes that something else has too"
    tensors = list(reachable(learner))
    assert any("heads" in path for path, _ in tensors) and len(tensors) > 20
    kept = [f"{path} {tuple(x.shape)}" for path, x in tensors if x.ndim and x.shape[0] in sizes]
    assert not kept, kept
    assert not [path for path, x in tensors if x.ndim == 4 and tuple(x.shape[1:]) == (3, 32, 32)]


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


def test_one_pass_an_image(name: str) -> None:
    learner = learned(name)
    calls: list[int] = []
    handle = learner.backbone.register_forward_hook(lambda *_: calls.append(1))
    learner.outputs(three_tasks()[0])
    handle.remove()
    assert len(calls) == learner.forward_passes


def test_the_record_of_a_task(name: str) -> None:
    learner = learned(name)
    for record, task in zip(learner.tasks, taught(name, three_tasks()), strict=True):
        assert record.classes == tuple(task.classes) and record.train_images == len(task)
        assert min(record.prepare_seconds, record.learn_seconds, record.consolidate_seconds) >= 0
        assert record.to_dict().keys() - timeless(record.to_dict()).keys() == {
            *("learned_at", "prepare_seconds", "learn_seconds", "consolidate_seconds")
        }
    sizes = [record.stored_bytes for record in learner.tasks]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sum(x.numel() * x.element_size() for x in learner.method.state().values())


def test_fields_of_outputs_are_on_the_cpu_in_fp32(name: str) -> None:
    outputs = learned(name).outputs(three_tasks()[0])
    for field in fields(Outputs):
        value = getattr(outputs, field.name)
        if isinstance(value, torch.Tensor) and field.name not in ("row_task", "row_class"):
            assert value.dtype == torch.float32 and value.device.type == "cpu", field.name
