"""Models whose hashes fit and whose content was changed: one sentence, no huge allocation, no NaN."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import EVERY_METHOD, new_learner, small_config, three_tasks
from tampering import Edit, tamper
from tiny import tiny_backbone
from torch import Tensor

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError
from duallora.classifiers.prototypes import Prototypes
from duallora.predictions import predictions
from duallora.storage import checkpoint
from duallora.storage.soundness import check

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    learner = new_learner(DualLoRAConfig(rank=4, residual_rank=2, residual="own", epochs=1, min_steps=0))
    for task in three_tasks()[:2]:
        learner.learn(task)
    learner.save(folder)
    return folder


def load(folder: Path) -> ContinualLearner:
    return ContinualLearner.load(folder, device="cpu", backbone=tiny_backbone())


def of_manifest(*path: Any, value: Any) -> Edit:
    def edit(manifest: dict[str, Any], _: dict[str, Tensor]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


def of_tensor(end: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = change(tensors[name])

    return edit


def renamed(end: str, new: str) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name.removesuffix(end) + new] = tensors.pop(name)

    return edit


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


HUGE = 10**15
EDITS: dict[str, Edit] = {
    "a huge task in the rows": of_tensor("rows.task", filled(HUGE)),
    "a task below zero": of_tensor("rows.task", first(-1)),
    "a task too many in the gate": of_tensor("gate.1.rows.task", first(7)),
    "a huge task of a fit": renamed("rows.fit.0", f"rows.fit.{HUGE}"),
    "a huge task of a residual adapter": renamed("residual.0.c", f"residual.{HUGE}.c"),
    "a huge layer": renamed("layers.1.kv.phi", f"layers.{HUGE}.kv.phi"),
    "rows of another width": of_tensor("rows.mean", lambda x: x[:, :-1]),
    "rows in three dimensions": of_tensor("rows.mean", lambda x: x[None]),
    "a covariance that is no square": of_tensor("rows.scatter", lambda x: x[:-1]),
    "a count too few": of_tensor("rows.count", lambda x: x[1:]),
    "a count below zero": of_tensor("rows.count", filled(-3)),
    "a mean of no number": of_tensor("rows.mean", first(float("nan"))),
    "an infinite covariance": of_tensor("rows.scatter", first(float("inf"))),
    "a head of no numbers": of_tensor("heads.tasks.0.weight", filled(float("nan"))),
    "a head of another width": of_tensor("heads.tasks.0.weight", lambda x: x[:, :-2]),
    "a head of other classes": of_tensor("heads.tasks.1.weight", lambda x: torch.cat([x, x])),
    "a basis of another height": of_tensor("kv.phi", lambda x: x[:-1]),
    "sizes of other bases": of_tensor("kv.sizes", filled(HUGE)),
    "a residual adapter of another shape": of_tensor("residual.0.c", lambda x: x[:, :-1]),
    "an update of another shape": of_tensor("orthogonal.0.b", lambda x: x[:, :-1]),
    "a mean in three dimensions at the gate": of_tensor("gate.1.rows.mean", lambda x: x[None]),
    "complex numbers": of_tensor("rows.mean", lambda x: x.to(torch.complex64)),
    "a missing tensor": lambda _, tensors: tensors.__delitem__("rows.scatter"),
    "an input of 100,000 pixels": of_manifest("backbone", "input_size", value=[3, 100_000, 100_000]),
    "an input of no pixels": of_manifest("backbone", "input_size", value=[3, 0, 16]),
    "an input of words": of_manifest("backbone", "input_size", value="big"),
    "no spread of pixels": of_manifest("backbone", "std", value=[0, 0, 0]),
    "a mean of NaN": of_manifest("backbone", "mean", value=[float("nan")] * 3),
    "a crop of the infinite": of_manifest("backbone", "crop_pct", value=float("inf")),
    "a huge rank": of_manifest("config", "rank", value=HUGE),
    "a huge residual rank": of_manifest("config", "residual_rank", value=10**9),
    "a huge first layer": of_manifest("config", "first_adapted_layer", value=HUGE),
    "a rank of words": of_manifest("config", "rank", value={"a": []}),
    "a field that there is not": of_manifest("config", "nonsense", value=1),
    "a method that there is not": of_manifest("method", value=["duallora"]),
    "a seed below zero": of_manifest("seed", value=-1),
    "no classes": of_manifest("classes", value=[]),
    "a class of no text": of_manifest("tasks", 0, "classes", value=[3]),
    "a broken name": of_manifest("tasks", 0, "name", value=None),
    "tasks as a mapping": of_manifest("tasks", value={"a": 1}),
    "images below zero": of_manifest("tasks", 0, "train_images", value=-5),
    "a record without its day": lambda manifest, _: manifest["tasks"][0].pop("learned_at") and None,
    "a backbone of words": of_manifest("backbone", value="embedded"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_contradicts_itself_is_one_sentence(saved: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved, model)
    tamper(model, EDITS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DualLoRAError) as refused:
        load(model)
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 700, sentence
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "part", ["orthogonal.0.a", "orthogonal.0.b", "residual.0.psi", "residual.0.c", "kv.phi"]
)
def test_what_stands_beside_a_projection_has_two_dimensions(saved: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(saved, tmp_path / "model")
    tamper(tmp_path / "model", of_tensor(part, lambda x: x[None]))
    with pytest.raises(DualLoRAError, match=rf"{part} has 3 dimensions, and a matrix has two"):
        load(tmp_path / "model")


def test_what_is_loaded_has_the_dimensions_of_its_place() -> None:
    rows = Prototypes(4)
    rows.load_state_dict({"mean": torch.ones(3, 4)})
    assert rows.mean.shape == (3, 4)
    with pytest.raises(RuntimeError, match="mean has 3 dimensions, not 2"):
        rows.load_state_dict({"mean": torch.ones(1, 3, 4)})


def test_overflowing_but_finite_numbers_give_no_nan(saved: Path, tmp_path: Path) -> None:
    """Whether such a model is refused when it is read or when it answers, it never says NaN."""
    for number, end in enumerate(("heads.tasks.0.weight", "rows.mean", "rows.scatter", "orthogonal.0.b")):
        model = tmp_path / str(number)
        shutil.copytree(saved, model)
        tamper(model, of_tensor(end, filled(3e38)))
        try:
            (found,) = load(model).predict([torch.zeros(3, 32, 32)])
        except DualLoRAError:
            continue
        assert 0 <= found.probability <= 1 and 0 <= found.unknown <= 1 and 0 <= found.task_confidence <= 1


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_what_every_method_saves_is_sound(tmp_path: Path, method: str) -> None:
    learner = new_learner(small_config(method))
    tasks = three_tasks()[: 1 if learner.method.all_at_once else 2]
    for task in tasks:
        learner.learn(task)
    learner.save(tmp_path / "model")
    check(tmp_path / "model", *checkpoint.read(tmp_path / "model"))
    if len(tasks) > 1:
        learner.forget(name=learner.classes[0])
        learner.forget(task=learner.tasks[0].name)
        learner.save(tmp_path / "model")
        check(tmp_path / "model", *checkpoint.read(tmp_path / "model"))


@pytest.mark.parametrize("seed", range(40))
def test_random_edits_end_in_one_sentence_or_in_numbers(saved: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    model = tmp_path / "model"
    shutil.copytree(saved, model)

    def edit(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(sorted(tensors))
            tensor = tensors[name]
            change = rng.randrange(6)
            if change == 0 and tensor.ndim:
                tensors[name] = tensor[:-1]
            elif change == 1 and tensor.ndim:
                tensors[name] = torch.cat([tensor, tensor])
            elif change == 2:
                tensors[name] = tensor.reshape(-1)
            elif change == 3 and tensor.numel():
                value = rng.choice([float("nan"), 1e38, -1.0, 0.0]) if tensor.is_floating_point() else HUGE
                tensors[name] = first(value)(tensor)
            elif change == 4:
                tensors[name] = tensor.to(rng.choice([torch.float16, torch.int64, torch.float64]))
            else:
                del tensors[name]

    tamper(model, edit)
    try:
        learner = load(model)
        outputs = learner.outputs_of([torch.rand(3, 3, 32, 32)])
    except DualLoRAError as error:
        assert "\n" not in str(error)
        return
    names = [task.name for task in learner.tasks]
    found = predictions(outputs, learner.classes, names, [None] * 3, 3)
    assert all(0 <= each.probability <= 1 and 0 <= each.unknown <= 1 for each in found)
