"""Training and prediction through inductor, not only through a tracer; and what happens when it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_tasks import Patterns, small_config, three_tasks
from tiny import tiny_backbone, tiny_images

from duallora import ContinualLearner
from duallora.backbones.backbone import Backbone, load_backbone
from duallora.outputs import Outputs
from duallora.runtime.compute import Compute

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler for torch.compile"),
]


def shallow() -> Backbone:
    """The stem and two layers of the embedded backbone: a third layer of the same kind compiles likewise."""
    whole = load_backbone()
    whole.model.blocks = whole.model.blocks[:2]
    return Backbone(whole.model, whole.info)


BACKBONES: dict[str, Callable[[], Backbone]] = {"embedded": shallow, "vit": tiny_backbone}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learner(backbone: Backbone, *, compile: bool, **changes: Any) -> ContinualLearner:
    machine = Compute("cpu", precision="32", compile=compile, workers=0).start()
    return ContinualLearner(backbone, small_config(batch_size=4, **changes), device=machine)


def assert_close(found: Outputs, expected: Outputs) -> None:
    for name in ("heads", "calibrated", "task_posterior", "features"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("residual", ["none", "own"])
@pytest.mark.parametrize("name", BACKBONES)
def test_inductor_trains_and_predicts(name: str, residual: str) -> None:
    """Six images in batches of four: the last batch is smaller, and predictions are of any number."""
    plain, compiled = (learner(BACKBONES[name](), compile=c, residual=residual) for c in (False, True))
    for made in (plain, compiled):
        for task in three_tasks(per_class=3)[:2]:
            made.learn(task)
    assert compiled.backbone.compiled  # nothing has been left out
    channels, height, width = plain.backbone.info.input_size
    images = torch.randn(5, channels, height, width, generator=torch.Generator().manual_seed(0))
    for size in (5, 1, 3):
        assert_close(compiled.outputs_of([images[:size]]), plain.outputs_of([images[:size]]))


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_compiler_that_fails_is_left_out_with_a_sentence(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def fails(*_: object) -> Any:
        raise RuntimeError("no code for this")

    backend = aot_autograd(fw_compiler=fails if way == "there" else lambda g, _: g, bw_compiler=fails)
    compile = Backbone.compile
    monkeypatch.setattr(Backbone, "compile", lambda self: compile(self, backend=backend))
    plain = learner(tiny_backbone(), compile=False)
    compiled = learner(tiny_backbone(), compile=True)
    task = Patterns(["ant", "bee"], 3)
    plain.learn(task)
    with pytest.warns(UserWarning, match=r"^torch\.compile failed and is left out"):
        compiled.learn(task)
    assert not compiled.backbone.compiled
    for a, b in zip(compiled.method.state().values(), plain.method.state().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert_close(compiled.outputs_of([tiny_images(3)]), plain.outputs_of([tiny_images(3)]))
