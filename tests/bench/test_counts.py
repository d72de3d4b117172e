"""What does not depend on how fast a machine is: operations, passes, bytes and graph breaks.

On the embedded backbone at 1, 10 and 50 tasks, so that a change that costs is seen where nothing is timed.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_same_state, exact_learner, new_learner, small_config, three_tasks
from tiny import tiny_backbone, tiny_images
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from duallora import METHODS, ContinualLearner, DualLoRAConfig, load_backbone
from duallora.backbones.backbone import Backbone
from duallora.bench.candidates import Candidate, Training
from duallora.bench.counts import flops, images_seen, state_bytes
from duallora.bench.synthetic import simulated_learner
from duallora.methods.lora import LoRAConfig
from duallora.runtime.compute import Compute, Machine

# Synthetic tasks take more directions than a narrow layer has.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]

CLASSES, TASKS = 10, (1, 10, 50)
CONFIGS = {
    "none": DualLoRAConfig(residual="none", projections="kv"),
    "own": DualLoRAConfig(rank=10, residual="own", residual_rank=10, known_domain=2, projections="kv"),
}


@cache
def weights() -> Backbone:
    return load_backbone()


def embedded() -> Backbone:
    return copy.deepcopy(weights())


@cache
def machine() -> Machine:
    return Compute("cpu", precision="32").start()


@cache
def simulated(kind: str, tasks: int) -> ContinualLearner:
    return simulated_learner(embedded(), CONFIGS[kind], tasks, CLASSES, device=machine())


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def per_image(call: Callable[[torch.Tensor], object]) -> float:
    return flops(lambda: call(images())) / 2


def test_products_in_place_are_operations_too() -> None:
    y, h, c = torch.zeros(6, 8), torch.ones(6, 3), torch.ones(3, 8)
    assert flops(lambda: y.addmm_(h, c)) == flops(lambda: h @ c) == 2 * 6 * 3 * 8
    each = y.view(2, 3, 8)
    assert flops(lambda: each.baddbmm_(h.view(2, 3, 3), c.expand(2, 3, 8))) == 2 * 6 * 3 * 8


# -- prediction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_of_a_prediction(kind: str, tasks: int) -> None:
    """Those of the backbone, the residual adapters, heads and rows: nothing else, and no second pass."""
    learner, backbone = simulated(kind, tasks), weights()
    rows, width, tokens, dim, layers = tasks * CLASSES, backbone.row_dim, 65, backbone.dim, 4
    expected = per_image(backbone)
    expected += 2 * 2 * width * rows  # heads, and how they began
    expected += 2 * width**2 + 2 * width * rows  # whitening once, scores once
    if kind == "own":
        columns = 10 * (tasks if tasks <= 10 else 4)  # all side by side, or those of the four strongest tasks
        expected += layers * tokens * 2 * columns * (dim + 2 * dim)
        if tasks > 1:
            expected += 2 * (2 * dim) ** 2 + 2 * (2 * dim) * rows  # the gate's rows, read once
            expected += 2 * rows * tasks  # and summed by task
    assert per_image(learner.method.logits) == expected
    assert expected / per_image(backbone) < {"none": 1.01, "own": 1.15}[kind]


@pytest.mark.parametrize("name", METHODS)
def test_passes_of_a_prediction(name: str) -> None:
    learner = simulated_learner(tiny_backbone(), small_config(name), 2, 2, device=machine())
    with images_seen(learner.backbone) as seen:
        learner.method.logits(tiny_images(4))
    assert seen.images / 4 == learner.forward_passes


# -- training ------------------------------------------------------------------------------------------------


def training(config: Any, tasks: int, backbone: Backbone | None = None) -> Training:
    made = Training(Candidate("x", config), backbone or embedded(), tasks, CLASSES, 20, 4, machine())
    made.prepare()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("tasks", TASKS)
def test_operations_and_passes_of_training(tasks: int) -> None:
    """The default costs what plain LoRA of its rank does, less the gradient of A; two passes, no third."""
    plain = flops(training(LoRAConfig(), tasks).gradients)
    for config in CONFIGS.values():
        learner = training(config, tasks)
        with images_seen(learner.learner.backbone) as seen:
            ratio = flops(learner.gradients) / plain
            learner.consolidate()
        assert learner.task.passes == 2
        assert seen.images == 4 + 20
        # Earlier residuals run forward; gradients reach the lower layers through them.
        assert ratio < (1.01 if config.residual == "none" or tasks == 1 else 1.25)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bytes_of_a_task(kind: str) -> None:
    sizes = [state_bytes(simulated(kind, tasks).method.state()) for tasks in (1, 10)]
    backbone = sum(p.numel() * p.element_size() for p in weights().parameters())
    each = (sizes[1] - sizes[0]) / 9
    assert each < 0.05 * backbone  # d is small here; of ViT-B it is below 1 %


# -- compilation ---------------------------------------------------------------------------------------------

SETTINGS = {
    "default": {"residual": "none"},
    "own": {"residual": "own"},
    "gathered": {"residual": "own", "top_tasks": 1},
    "layer": {"residual": "own", "gate": "layer"},
    "off": {"residual": "next", "gate": "off"},
    "energy": {"residual": "protected", "relevance": "energy"},
    "class token": {"residual": "own", "moments": "class_token"},
}


@pytest.fixture
def compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no direction is left")
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_compiles_in_one_piece(
    setting: str, compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph breaks, at most one graph more for a task, and what is learned is the same to the bit."""
    if setting == "gathered":
        monkeypatch.setattr("duallora.adapters.dual_lora.STACKED_LIMIT", 4)
    # In bf16 a processor takes its attention apart, but not in compiled passes: other rounding.
    plain, compiled = (exact_learner(small_config(**SETTINGS[setting])) for _ in range(2))
    compiled.backbone.compile(backend=compiler, dynamic=True)
    for number, task in enumerate(three_tasks()):
        plain.learn(task)
        compiled.learn(task)
        assert compiler.frame_count <= number + 2
    assert not counters["graph_break"]
    assert_same_state(compiled, plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler for torch.compile")
def test_compiled_predictions_are_the_plain_ones(compiler: CompileCounter) -> None:
    """By the code that the compiler makes, not only by the graph that it sees."""
    learner = new_learner(small_config(residual="own"))
    for task in three_tasks():
        learner.learn(task)
    plain = learner.method.logits(tiny_images(5))
    learner.backbone.compile(dynamic=True)
    compiled = learner.method.logits(tiny_images(5))
    for name in ("heads", "calibrated", "task_posterior", "familiarity", "gate", "features"):
        expected, found = getattr(plain, name), getattr(compiled, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_predictions_of_any_batch_compile_twice(name: str, compiler: CompileCounter) -> None:
    """Once for a single image, once for all other numbers, without graph breaks; after a task once more."""
    learner = simulated_learner(tiny_backbone(), small_config(name), 2, 2, device=machine())
    expected = learner.method.logits(tiny_images(5))
    learner.backbone.compile(backend=compiler, dynamic=True)
    for size in range(1, 6):
        found = learner.method.logits(tiny_images(5)[:size])
        torch.testing.assert_close(found.heads.exp(), expected.heads[:size].exp(), rtol=0, atol=1e-5)
    assert compiler.frame_count <= 2 * learner.forward_passes
    if not METHODS[name].method.all_at_once:
        learner.learn(Patterns(["yak", "zebra"], 4))
        before = compiler.frame_count
        for size in range(1, 6):
            learner.method.logits(tiny_images(5)[:size])
        assert compiler.frame_count - before <= 2 * learner.forward_passes
    assert not counters["graph_break"]
