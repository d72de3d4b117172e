"""Random states of many tasks: what measurements stand on has the shapes that learning leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_tasks import Patterns, assert_same_outputs, new_learner, reloaded, small_config, three_tasks
from tiny import tiny_backbone, tiny_images

from duallora import METHODS
from duallora.bench.synthetic import simulated_learner

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]


@pytest.mark.parametrize("name", METHODS)
def test_a_simulated_state_can_be_read_saved_and_taught(name: str, tmp_path: Path) -> None:
    learner = simulated_learner(tiny_backbone(), small_config(name), tasks=3, classes=2, device="cpu")
    outputs = learner.outputs_of([tiny_images(4)])
    assert outputs.heads.shape == (4, 6)
    assert all(task.name.startswith("synthetic") for task in learner.tasks)
    loaded = reloaded(learner, tmp_path / "model")
    assert_same_outputs(loaded.outputs_of([tiny_images(4)]), outputs)
    assert learner.method.state().keys() == loaded.method.state().keys()
    if not METHODS[name].method.all_at_once:
        loaded.learn(Patterns(["yak", "zebra"], 4))
        assert bool(loaded.outputs_of([tiny_images(4)]).heads.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_a_simulated_state_has_the_shapes_of_a_learned_one(name: str) -> None:
    """But for what the images decide: directions that are used up, and ranks that a gate has closed."""
    tasks = [Patterns(task.classes[:2], 6, seed) for seed, task in enumerate(three_tasks())]
    tasks = tasks[:1] if METHODS[name].method.all_at_once else tasks
    learned = new_learner(small_config(name))
    for task in tasks:
        learned.learn(task)
    simulated = simulated_learner(
        tiny_backbone(), small_config(name), tasks=len(tasks), classes=2, device="cpu"
    )
    a, b = (each.method.state() for each in (learned, simulated))
    decided = (".phi", ".sizes", ".basis", ".retain", ".a", ".b", ".g", ".dense")
    for key in a.keys() | b.keys():
        if not key.endswith(decided) and not key.endswith((".psi", ".c")):
            assert a[key].shape == b[key].shape, key
            assert a[key].dtype == b[key].dtype, key
    assert {k for k in a if ".dense" not in k and ".orthogonal." not in k and ".residual." not in k} == {
        k for k in b if ".dense" not in k and ".orthogonal." not in k and ".residual." not in k
    }


def test_two_simulated_states_are_equal() -> None:
    first, second = (
        simulated_learner(tiny_backbone(), small_config(), tasks=2, classes=2, device="cpu") for _ in range(2)
    )
    for name, tensor in first.method.state().items():
        assert torch.equal(tensor, second.method.state()[name]), name
