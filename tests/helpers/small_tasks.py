"""Small tasks that a tiny backbone learns in a fraction of a second, and comparisons of what was learned."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE, tiny_backbone, tiny_images
from torch.utils.data import Dataset

from duallora import METHODS, ContinualLearner, DualLoRAConfig, MethodConfig
from duallora.outputs import Outputs
from duallora.runtime.compute import Compute
from duallora.streams.task import TaskDataset, as_task_dataset, concatenated

_FEW = ("duallora", "joint", "l2p", "slca", "ranpac")
EVERY_METHOD = [name if name in _FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
"""All methods, for a test that `make check` tries on a few that have little in common."""

TIMES = ("learned_at", "prepare_seconds", "learn_seconds", "consolidate_seconds")


class Patterns(Dataset[tuple[torch.Tensor, int]]):
    """Noisy random patterns as uint8 images; a class name always stands for the same pattern.

    Args:
        classes: class names.
        per_class: images of each class, one number for all or one each.
        seed: draws the noise.
        shift: added to every pixel, to show the same classes in another light.
    """

    def __init__(
        self, classes: Sequence[str], per_class: int | Sequence[int] = 8, seed: int = 0, shift: float = 0.0
    ) -> None:
        counts = [per_class] * len(classes) if isinstance(per_class, int) else list(per_class)
        self.classes = list(classes)
        self.targets = [k for k, count in enumerate(counts) for _ in range(count)]
        noise = torch.Generator().manual_seed(seed)
        means = [self._pattern(name) for name in classes]
        self.images = [
            (means[k] + shift + 40 * torch.randn(3, IMAGE, IMAGE, generator=noise)).clamp(0, 255).byte()
            for k in self.targets
        ]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]

    @staticmethod
    def _pattern(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        coarse = 255 * torch.rand(3, 4, 4, generator=generator)
        return coarse.repeat_interleave(IMAGE // 4, 1).repeat_interleave(IMAGE // 4, 2)


def three_tasks(per_class: int = 6) -> list[Patterns]:
    """Three tasks of two, three and two classes."""
    names = (["ant", "bee"], ["cat", "dog", "elk"], ["fox", "gnu"])
    return [Patterns(classes, per_class, seed) for seed, classes in enumerate(names)]


def one_domain() -> list[Patterns]:
    """Three tasks of two classes: the same two patterns in other noise, under other names."""
    tasks = [Patterns(["ant", "bee"], 8, seed) for seed in range(3)]
    for task, names in zip(tasks, (["ant", "bee"], ["cat", "dog"], ["elk", "fox"]), strict=True):
        task.classes = names
    return tasks


def small_config(name: str = "duallora", **changes: Any) -> MethodConfig:
    """A configuration of a method for small tasks; ranks leave room for three tasks in 32 dimensions."""
    config = METHODS[name].config
    small: dict[str, Any] = {
        "epochs": 1,
        "min_steps": 0,
        "batch_size": 8,
        "rank": 4,
        "residual": "next",
        "residual_rank": 4,
        "known_domain": 2.0,
        "energy_threshold": 0.7,
        "learning_rate": 2e-2,
        "random_features": 48,
        "drift_steps": 20,
        "samples": 16,
        "refit_epochs": 8,
    }
    if name == "duallora":  # as narrow as the others' updates
        small["projections"] = "kv"
    known = {field.name for field in fields(config)}
    return config(**({k: v for k, v in small.items() if k in known} | changes))


def new_learner(config: MethodConfig | None = None, seed: int = 0, **backbone: Any) -> ContinualLearner:
    """A learner on a tiny random ViT, which is the same on every call."""
    return ContinualLearner(tiny_backbone(**backbone), config or small_config(), seed, device="cpu")


def exact_learner(config: MethodConfig, **backbone: Any) -> ContinualLearner:
    """A learner as :func:`new_learner`, in fp32 whatever the processor has: to be compared with formulas."""
    machine = Compute("cpu", precision="32").start()
    return ContinualLearner(tiny_backbone(**backbone), config, device=machine)


def taught(name: str, tasks: Sequence[Patterns]) -> list[Patterns | TaskDataset]:
    """The tasks as the method takes them: joint training has all their images in one."""
    if not METHODS[name].method.all_at_once or len(tasks) < 2:
        return list(tasks)
    names = list(dict.fromkeys(c for task in tasks for c in task.classes))
    return [concatenated([as_task_dataset(task) for task in tasks], names)]


def learned(
    name: str, tasks: list[Patterns] | None = None, seed: int = 0, **changes: Any
) -> ContinualLearner:
    """A learner of a method after the tasks, by default the three."""
    learner = new_learner(small_config(name, **changes), seed)
    for task in taught(name, three_tasks() if tasks is None else tasks):
        learner.learn(task)
    return learner


def assert_carried(name: str, family: str) -> None:
    """The method changes the features of a backbone family, and all of them are numbers."""
    learner = new_learner(small_config(name), family=family)
    images = tiny_images()
    bare = learner.method.extract(images)
    for task in three_tasks()[:2]:
        learner.learn(task)
    found = learner.method.extract(images).detach()
    assert found.shape == bare.shape and bool(found.isfinite().all())
    assert float((found - bare).abs().max()) > 1e-3


def reloaded(learner: ContinualLearner, folder: Path, **backbone: Any) -> ContinualLearner:
    """The learner after a way through a folder, on a fresh copy of its backbone."""
    learner.save(folder)
    return ContinualLearner.load(folder, device="cpu", backbone=tiny_backbone(**backbone))


def unseen(tasks: Sequence[Patterns], per_class: int = 3) -> Patterns:
    """Other images of all classes of the tasks."""
    names = list(dict.fromkeys(name for task in tasks for name in task.classes))
    return Patterns(names, per_class, seed=99)


def assert_same_outputs(found: Outputs, expected: Outputs) -> None:
    """Every field is equal bit for bit, and no log-probability is NaN."""
    for field in fields(Outputs):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert not b.isnan().any(), field.name
            assert torch.equal(a, b), f"{field.name}: {(a - b).abs().max()}"
        else:
            assert a == b, field.name


def assert_same_state(found: ContinualLearner, expected: ContinualLearner) -> None:
    """All learned tensors are equal bit for bit, and the records but for their times."""
    a, b = found.method.state(), expected.method.state()
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    assert found.classes == expected.classes
    assert [timeless(task.to_dict()) for task in found.tasks] == [
        timeless(t.to_dict()) for t in expected.tasks
    ]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A task's record without what a clock gave."""
    return {key: value for key, value in record.items() if key not in TIMES}


def default_fields() -> dict[str, Any]:
    """Fields of DualLoRA with their default values."""
    return {field.name: field.default for field in fields(DualLoRAConfig)}
