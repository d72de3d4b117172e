"""SLDC and SLCA on tiny backbones, with what a test looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from small_tasks import Patterns, new_learner, small_config, three_tasks
from torch import Tensor

from duallora import ContinualLearner
from duallora.methods import Batch, Method, TaskInfo
from duallora.methods.slca import SLCA
from duallora.methods.sldc import SLDC

TASKS = three_tasks()


def started(name: str, tasks: int = 0, **changes: Any) -> ContinualLearner:
    """A learner of the first tasks that computes in fp32 everywhere."""
    learner = new_learner(small_config(name, **changes))
    learner.method.context = replace(learner.method.context, autocast=nullcontext)
    for task in TASKS[:tasks]:
        learner.learn(task)
    return learner


def sldc(learner: ContinualLearner) -> SLDC:
    assert isinstance(learner.method, SLDC)
    return learner.method


def slca(learner: ContinualLearner) -> SLCA:
    assert isinstance(learner.method, SLCA)
    return learner.method


def loader_of(learner: ContinualLearner, task: Patterns) -> Any:
    images = torch.stack([learner.preprocess(image) for image in task.images])
    batch = Batch(images, torch.tensor(task.targets), torch.arange(len(task)))

    def loader() -> Iterator[Batch]:
        yield batch

    return loader


def prepared(learner: ContinualLearner, index: int) -> tuple[Method, Batch]:
    """The method in the middle of a task, and all its images."""
    loader = loader_of(learner, TASKS[index])
    learner.method.prepare(TaskInfo(index, "now", tuple(TASKS[index].classes)), loader)
    return learner.method, next(loader())


def state_of(learner: ContinualLearner) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in learner.method.state().items()}
