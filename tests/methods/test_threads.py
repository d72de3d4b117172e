"""Two predictions at once, in two threads on one model, say what each says alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from small_tasks import small_config, three_tasks
from tiny import tiny_backbone, tiny_images

from duallora import METHODS, ContinualLearner
from duallora.methods import BatchOutputs, Method

pytestmark = pytest.mark.slow

CHANGES: dict[str, dict[str, Any]] = {
    "duallora": {"residual": "own", "relevance": "energy", "calibration": "task", "gate": "first"}
}
ONE_BY_ONE = ("slca", "duct")  # passes wait for one another
NAMES = [name for name in METHODS if not METHODS[name].method.all_at_once]
LONG = 300.0  # seconds after which a thread that never comes is given up


class Steps(NamedTuple):
    """What a thread calls in its prediction and after it."""

    inside: Callable[[], object]
    after: Callable[[], object]


def taught(name: str) -> Method:
    config = small_config(name, **CHANGES.get(name, {}))
    learner = ContinualLearner(tiny_backbone(depth=3), config, device="cpu")
    for task in three_tasks()[:2]:
        learner.learn(task)
    return learner.method


def at_once(method: Method, block: int, first: Steps, second: Steps) -> None:
    """Predicts in two threads and compares the answers with those of the same images alone.

    Args:
        method: predicts.
        block: where a thread calls the first of its functions, in the last of its passes.
        first: what one thread calls there, and after its prediction.
        second: the same for the other thread.
    """
    images = tiny_images(5, 1), 2 * tiny_images(3, 2)
    alone = [method.logits(x) for x in images]
    passes: dict[int, int] = {}
    steps: dict[int, Steps] = {}

    def reached(*_: Any) -> None:
        own = threading.get_ident()
        passes[own] += 1
        if passes[own] == method.passes:
            steps[own].inside()

    def predict(x: torch.Tensor, own: Steps) -> BatchOutputs:
        passes[threading.get_ident()], steps[threading.get_ident()] = 0, own
        try:
            return method.logits(x)
        finally:
            own.after()

    handle = method.backbone.model.get_submodule(f"blocks.{block}").register_forward_pre_hook(reached)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(predict, x, own) for x, own in zip(images, (first, second), strict=True)]
        found = [future.result() for future in waiting]
    handle.remove()
    assert [passes[each] for each in passes] == [method.passes] * 2
    for readout, expected in zip(found, alone, strict=True):
        for field, value in vars(expected).items():
            if value is None:
                assert getattr(readout, field) is None
            else:
                torch.testing.assert_close(getattr(readout, field), value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_BY_ONE])
@pytest.mark.parametrize("block", [1, 2])
def test_a_pass_that_lies_inside_another(name: str, block: int) -> None:
    """The first stops at a block until the other, on other images, is through."""
    stopped, finished = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        assert finished.wait(LONG)

    second = Steps(lambda: stopped.wait(LONG), finished.set)
    at_once(taught(name), block, Steps(stop, finished.set), second)


@pytest.mark.parametrize("name", NAMES)
def test_passes_that_overlap(name: str) -> None:
    """The first goes on when the second has begun, and the second when the first has ended."""
    begun, ended = threading.Event(), threading.Event()
    # Where they wait for one another, the second does not begin before the first has ended.
    patience = 0.2 if name in ONE_BY_ONE else LONG

    def first() -> None:
        assert begun.wait(patience) or name in ONE_BY_ONE

    def second() -> None:
        begun.set()
        assert ended.wait(patience) or name in ONE_BY_ONE

    at_once(taught(name), 2, Steps(first, ended.set), Steps(second, begun.set))


def test_the_gate_matters_to_what_is_compared() -> None:
    method = taught("duallora")
    readout = method.logits(tiny_images(5, 1))
    assert readout.gate is not None and float(readout.gate.std(0).max()) > 1e-3
    bare = method.backbone(tiny_images(5, 1))[:, : method.backbone.feature_dim]
    assert not torch.allclose(bare, readout.features, atol=1e-3)
