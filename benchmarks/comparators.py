"""What the released forms of the comparators change: five tasks of digits on the embedded backbone.

    python benchmarks/comparators.py PART [--seeds 0,1,2] [--train-per-class 40]

PART is one of

- schedule: InfLoRA and DualPrompt, ten epochs, along half a cosine to zero and along the released quarter;
- sldc: its nonlinear map without a penalty (released), with it, and the linear map; the share of the MLP in
  the map of the last task, and how far the means that both nonlinear maps give lie apart, over how far they
  moved;
- heads: SLCA and SLDC refitted from the trained heads (released), and from those of the last refit;
- sd-lora: magnitudes kept and reset, and how many pairs a reset makes larger;
- mos: adapters merged once a step (the paper), and in every layer of every pass (released);
- tuna: the universal adapter's answer (the paper), and the newest task's in its place (a public port).

Images are 8x8 pixels, so the backbone gets 32x32. Final accuracy over all classes in percent, by the heads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from duallora import METHODS, ContinualLearner
from duallora.backbones.backbone import load_backbone
from duallora.classifiers.alignment import Gaussians
from duallora.methods.drift import WeaklyNonlinear, weakly_nonlinear_map
from duallora.methods.sd_lora import SDLoRA
from duallora.methods.sldc import SLDC
from duallora.methods.tuna import WithUniversal
from duallora.streams.digits import digits
from duallora.streams.task import concatenated

Watch = Callable[[ContinualLearner], None]


def final(name: str, seed: int, per_class: int, watch: Watch | None = None, **fields: Any) -> float:
    """Accuracy of the heads after all tasks; ``watch`` gets the learner before the first one."""
    config = METHODS[name].config(**fields)
    learner = ContinualLearner(load_backbone(image_size=32), config, seed, device="cpu", augment="crop")
    if watch is not None:
        watch(learner)
    stream = digits(train_per_class=per_class)
    for task in stream:
        learner.learn(task.train)
    return 100 * learner.evaluate(concatenated([task.test for task in stream], stream.class_order)).accuracy


def schedule(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """InfLoRA and DualPrompt along both cosines."""
    for name in ("inflora", "dualprompt"):
        for kind in ("cosine", "quarter-cosine"):
            yield f"{name}, {kind}", final(name, seed, per_class, schedule=kind, epochs=10)


def sldc(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """The forms of the drift map."""
    last: dict[str, Any] = {}

    def watch(learner: ContinualLearner) -> None:
        method: Any = learner.method
        original = method._drift

        def noted(task: Any, before: Tensor, after: Tensor) -> Any:
            last.update(method=method, task=task, features=(before, after), means=method.gaussians.mean)
            last["map"] = original(task, before, after)
            return last["map"]

        method._drift = noted

    for drift in ("linear", "penalised", "nonlinear"):
        yield drift, final("sldc", seed, per_class, watch, drift=drift)
        if isinstance(last["map"], WeaklyNonlinear):
            yield f"{drift}, share of the MLP, %", 100 * float(last["map"].mix.softmax(0)[2])
    method: SLDC = last["method"]
    draws = method.generator(last["task"].index, "drift")
    other = weakly_nonlinear_map(*last["features"], method.config.drift_steps, draws, penalty=0.5)
    with torch.no_grad():
        x = last["means"]
        apart, moved = (last["map"](x) - other(x)).norm(dim=1), (other(x) - x).norm(dim=1)
    yield "means of the two nonlinear maps apart, % of the move", 100 * float((apart / moved).mean())


def heads(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """Where a refit starts."""
    restore = Gaussians.restore
    for name in ("slca", "sldc"):
        yield f"{name}, from the trained heads", final(name, seed, per_class)
        Gaussians.restore = lambda self, heads: None  # type: ignore[method-assign]
        yield f"{name}, from the last refit", final(name, seed, per_class)
        Gaussians.restore = restore  # type: ignore[method-assign]


def sd_lora(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """What a reset does to the pair of the task before."""
    released = {
        "optimizer": "sgd",
        "schedule": "constant",
        "learning_rate": 0.008,
        "head_learning_rate": 0.008,
    }
    for fields in ({}, released):
        named = "released rates" if fields else "defaults"
        larger: list[Tensor] = []

        def watch(learner: ContinualLearner, larger: list[Tensor] = larger) -> None:
            method: Any = learner.method
            original = method.normalise

            def noted(task: int) -> None:
                if task:
                    sizes = torch.stack([pairs.sizes(task - 1) for pairs in method.pairs]).detach()
                    larger.append(0.8 / (float(method.magnitudes[task - 1].detach()) * sizes.flatten()))
                original(task)

            assert isinstance(method, SDLoRA)
            method.normalise = noted

        own: dict[str, Any] = {**fields, "epochs": 20} if fields else {}
        yield f"kept, {named}", final("sd-lora", seed, per_class, **own)
        yield f"reset, {named}", final("sd-lora", seed, per_class, watch, reset_magnitudes=True, **own)
        factors = torch.cat(larger)
        yield f"pairs that a reset makes larger, {named}, %", 100 * float((factors > 1).float().mean())
        yield f"median factor, {named}", float(factors.median())


def mos(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """How often adapters are merged."""
    for repeated in (False, True):
        yield (
            f"merged {'in every pass' if repeated else 'once a step'}",
            final("mos", seed, per_class, repeated_merge=repeated),
        )


def tuna(seed: int, per_class: int) -> Iterator[tuple[str, float]]:
    """What stands in the place of the universal adapter."""
    yield "the universal adapter", final("tuna", seed, per_class)
    merge = WithUniversal.merge
    WithUniversal.merge = lambda self, tasks: merge(self, tasks[-1:])  # type: ignore[method-assign]
    yield "the newest task's adapter", final("tuna", seed, per_class)
    WithUniversal.merge = merge  # type: ignore[method-assign]


def main(words: list[str]) -> None:
    """Prints mean and sample standard deviation over the seeds."""
    parts = {"schedule": schedule, "sldc": sldc, "heads": heads, "sd-lora": sd_lora, "mos": mos, "tuna": tuna}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-per-class", type=int, default=40)
    asked = parser.parse_args(words)
    found: dict[str, list[float]] = {}
    for seed in map(int, asked.seeds.split(",")):
        for name, value in parts[asked.part](seed, asked.train_per_class):
            found.setdefault(name, []).append(value)
            print(f"seed {seed}: {name}: {value:.2f}", file=sys.stderr, flush=True)
    for name, values in found.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name}: {statistics.mean(values):.2f}{spread}")


if __name__ == "__main__":
    main(sys.argv[1:])
