"""What every registered method has to do, on a random ViT of two layers and 32 dimensions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import FunctionType, MethodType

import numpy as np
import pytest
import torch
from small_tasks import (
    Patterns,
    assert_same_outputs,
    assert_same_state,
    learned,
    new_learner,
    reloaded,
    small_config,
    taught,
    three_tasks,
    timeless,
    unseen,
)
from tiny import tiny_backbone

from duallora import METHODS, ContinualLearner, load_backbone
from duallora.adapters.wrapped_mlp import unwrap_mlp
from duallora.adapters.wrapped_qkv import unwrap_attention
from duallora.outputs import Outputs
from duallora.predictions import class_probabilities

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("name", METHODS),
    pytest.mark.filterwarnings("ignore:.*no direction is left"),
]

UNTRAINED = {"ncm", "ranpac"}  # nothing takes gradients
REFITTED = {"slca", "sldc", "ssiat", "rsiat", "mos", "tuna", "duct"}  # earlier heads are trained again
MOVED = {"sldc", "ssiat", "rsiat", "lr-rgda"}  # rows of earlier tasks follow the drift of the features

REPEATED = [
    Patterns(["ant", "bee"], 6, 0),
    Patterns(["cat", "bee", "ant"], 6, 1, shift=60.0),
    Patterns(["bee"], 5, 2, shift=-60.0),
]


@cache
def _of_three_tasks(name: str) -> tuple[ContinualLearner, dict[str, torch.Tensor]]:
    learner = learned(name)
    return learner, {key: x.clone() for key, x in learner.method.state().items()}


@pytest.fixture
def reference(name: str) -> Iterator[ContinualLearner]:
    """A learner after the three tasks; all tests of a method read the same one, and none may teach it."""
    learner, before = _of_three_tasks(name)
    yield learner
    after = learner.method.state()
    assert after.keys() == before.keys() and len(learner.tasks) == len(taught(name, three_tasks()))
    assert all(torch.equal(after[key], x) for key, x in before.items())


@cache
def _of_repeated_classes(name: str) -> tuple[ContinualLearner, list[dict[str, torch.Tensor]]]:
    """A learner after the tasks that share classes, and what it had learned after each; only read."""
    learner, states = new_learner(small_config(name)), []
    for task in taught(name, REPEATED):
        learner.learn(task)
        states.append({key: x.clone() for key, x in learner.method.state().items()})
    return learner, states


def test_a_saved_learner_predicts_the_same(reference: ContinualLearner, tmp_path: Path) -> None:
    learner = reference
    data = unseen(three_tasks())
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_state(loaded, learner)
    assert_same_outputs(loaded.outputs(data), learner.outputs(data))
    assert loaded.tasks == learner.tasks and loaded.config == learner.config
    assert loaded.predict(data.images[:5]) == learner.predict(data.images[:5])


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_learner_learns_the_same(
    name: str, after: int, reference: ContinualLearner, tmp_path: Path
) -> None:
    tasks = taught(name, three_tasks())
    parts = new_learner(small_config(name))
    for task in tasks[:after]:
        parts.learn(task)
    parts = reloaded(parts, tmp_path / "model")
    for task in tasks[after:]:
        parts.learn(task)
    assert_same_state(parts, reference)
    assert_same_outputs(parts.outputs(unseen(three_tasks())), reference.outputs(unseen(three_tasks())))


def test_evaluating_between_tasks_changes_nothing(name: str, reference: ContinualLearner) -> None:
    learner = new_learner(small_config(name))
    for task in taught(name, three_tasks()):
        learner.learn(task)
        learner.evaluate(task)
        learner.predict([task[i][0] for i in range(3)])
    assert_same_state(learner, reference)


def test_two_equal_runs_are_equal(name: str, reference: ContinualLearner) -> None:
    assert_same_state(learned(name), reference)


def test_the_seed_counts(name: str, reference: ContinualLearner) -> None:
    first, second = (each.outputs(three_tasks()[0]).heads for each in (reference, learned(name, seed=1)))
    # Class means of frozen features are all that NCM has: nothing is drawn.
    assert torch.equal(first, second) == (name == "ncm")


@pytest.mark.parametrize("size", [1, 7, 128])
def test_predictions_do_not_depend_on_the_batch(size: int, reference: ContinualLearner) -> None:
    learner = reference
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


def test_probabilities_are_probabilities(reference: ContinualLearner) -> None:
    outputs = reference.outputs(unseen(three_tasks()))
    ones = torch.ones(len(outputs.heads))
    for rows in (outputs.heads, outputs.calibrated, outputs.task_posterior):
        assert rows is not None
        torch.testing.assert_close(rows.exp().sum(1), ones)
    assert outputs.familiarity is not None
    assert float(outputs.familiarity.min()) >= 0 and float(outputs.familiarity.max()) <= 1
    if outputs.gate is not None:
        assert float(outputs.gate.min()) >= 0 and float(outputs.gate.max()) <= 1


@pytest.mark.slow
def test_the_tasks_are_learned(name: str) -> None:
    tasks = three_tasks(10)
    learner = learned(name, tasks, epochs=4)
    # By chance one in seven; sequential LoRA forgets, but not the task it has just learned.
    assert learner.evaluate(Patterns(tasks[-1].classes, 10, seed=50)).accuracy > 2 / 7


@pytest.mark.slow
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
    unwrap_mlp(learner.backbone)
    after = learner.backbone.state_dict()
    assert after.keys() == originals.keys()
    for key, tensor in after.items():  # the very tensors, so nothing else took their place
        assert tensor.data_ptr() == originals[key].data_ptr(), key


@pytest.mark.slow
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
    learner = _of_repeated_classes(name)[0] if tasks is REPEATED else learned(name, tasks)
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
    learner, states = _of_repeated_classes(name)
    heads = [{key: x for key, x in state.items() if key.startswith("heads.")} for state in states]
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
    _, states = _of_repeated_classes(name)
    after = states[-1]
    before = {key: states[0][key] for key in ("rows.count", "rows.mean")}
    assert after["rows.count"].tolist() == ([12, 17, 6] if len(states) == 1 else [6, 6, 6, 6, 6, 5])
    for key, x in before.items():
        moved = name in MOVED and key == "rows.mean"
        assert torch.equal(after[key][: len(x)], x) != moved, key


@pytest.mark.slow
def test_global_random_numbers_have_no_part(name: str, reference: ContinualLearner) -> None:
    """The reference was made under other numbers, or under those of the method before."""
    seed = 1 + list(METHODS).index(name)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    assert_same_state(learned(name), reference)


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


def test_one_pass_an_image(reference: ContinualLearner) -> None:
    learner = reference
    calls: list[int] = []
    handle = learner.backbone.register_forward_hook(lambda *_: calls.append(1))
    learner.outputs(three_tasks()[0])
    handle.remove()
    assert len(calls) == learner.forward_passes


def test_the_record_of_a_task(name: str, reference: ContinualLearner) -> None:
    learner = reference
    for record, task in zip(learner.tasks, taught(name, three_tasks()), strict=True):
        assert record.classes == tuple(task.classes) and record.train_images == len(task)
        assert min(record.prepare_seconds, record.learn_seconds, record.consolidate_seconds) >= 0
        assert record.to_dict().keys() - timeless(record.to_dict()).keys() == {
            *("learned_at", "prepare_seconds", "learn_seconds", "consolidate_seconds")
        }
    sizes = [record.stored_bytes for record in learner.tasks]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sum(x.numel() * x.element_size() for x in learner.method.state().values())


def test_fields_of_outputs_are_on_the_cpu_in_fp32(reference: ContinualLearner) -> None:
    outputs = reference.outputs(three_tasks()[0])
    for field in fields(Outputs):
        value = getattr(outputs, field.name)
        if isinstance(value, torch.Tensor) and field.name not in ("row_task", "row_class"):
            assert value.dtype == torch.float32 and value.device.type == "cpu", field.name
