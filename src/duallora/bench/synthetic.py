"""States and tasks that stand for learned ones in measurements: random numbers of the right shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from duallora.backbones.backbone import Backbone
from duallora.learner import ContinualLearner
from duallora.methods import METHODS, Batch, Loader, Method, MethodConfig, TaskInfo, method_name
from duallora.outputs import TaskRecord
from duallora.runtime.compute import Machine
from duallora.training import EVALUATION_BATCH

NEVER = "1970-01-01T00:00:00+00:00"
"""When a synthetic task was learned."""


def simulated_learner(
    backbone: Backbone,
    config: MethodConfig,
    tasks: int,
    classes: int = 10,
    *,
    device: str | Machine = "cpu",
    exact_readouts: bool = True,
) -> ContinualLearner:
    """A learner as if it had learned so many tasks, filled with random bases, heads and rows.

    What it says means nothing, but it takes the time, the memory and the bytes of a learned one.

    Args:
        backbone: frozen, not taken by another learner.
        config: of the method.
        tasks: T; a method that learns all tasks at once gets one with the classes of all. 0 leaves it new.
        classes: of each task.
        device: where it computes.
        exact_readouts: as of :class:`ContinualLearner`.

    Returns:
        The learner; its tasks are named ``synthetic 1`` and so on.
    """
    learner = ContinualLearner(backbone, config, device=device, exact_readouts=exact_readouts)
    if METHODS[method_name(config)].method.all_at_once and tasks:
        tasks, classes = 1, tasks * classes
    infos = [task_info(index, classes) for index in range(tasks)]
    if infos:
        fill(learner.method, infos)
    for info in infos:
        learner.tasks.append(TaskRecord(info.name, info.classes, NEVER, 0, 0.0, 0.0, 0.0, 0, 0, None, None))
        learner.classes.extend(info.classes)
    return learner


@torch.no_grad()
def fill(method: Method, tasks: Sequence[TaskInfo]) -> None:
    """Fills a new method with random numbers of the shapes that learning these tasks would leave.

    What a pass costs depends on how much has been learned, not on what. The state can be saved, loaded and
    trained on like any other.
    """
    for task in tasks:
        method.heads.open(len(task.classes), method.generator(task.index))
        if method.imprinted:
            method.starts.open(len(task.classes), method.generator(task.index))
        method.pretend(task.index)
    method.heads.requires_grad_(False)
    generator = method.generator(len(tasks), "measured rows")
    method.rows.simulate([len(task.classes) for task in tasks], generator)
    for part in method.by_row:
        part.simulate(sum(len(task.classes) for task in tasks))
    for parameter in method.adapters.parameters():
        if not parameter.any():  # what starts at zero would be moved by training
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    for wrapper in method.beside.values():
        wrapper.merge()
    method.simulate(tasks)


def task_info(index: int, classes: int) -> TaskInfo:
    """A synthetic task by its index, from 0."""
    name = f"synthetic {index + 1}"
    return TaskInfo(index, name, tuple(f"{name}, class {k + 1}" for k in range(classes)))


class RandomTask:
    """Random images of a task, already where they are computed on: nothing is decoded or moved.

    Args:
        info: the task.
        count: number of images; labels go round the classes.
        size: (channels, height, width).
        device: where they lie.

    Attributes:
        passes: how often the images were gone through.
    """

    def __init__(self, info: TaskInfo, count: int, size: tuple[int, ...], device: torch.device) -> None:
        self.info, self.passes = info, 0
        generator = torch.Generator().manual_seed(info.index)
        self.images = torch.randn(count, *size, generator=generator).to(device)
        self.labels = torch.arange(count, device=device) % len(info.classes)

    def batch(self, start: int, size: int) -> Batch:
        """``size`` images from ``start`` on, round and round."""
        where = torch.arange(start, start + size, device=self.labels.device) % len(self.labels)
        return Batch(self.images[where], self.labels[where], where)

    @property
    def loader(self) -> Loader:
        """The images in order, as the passes of a method take them."""

        def one() -> Iterator[Batch]:
            self.passes += 1
            for start in range(0, len(self.labels), EVALUATION_BATCH):
                yield self.batch(start, min(EVALUATION_BATCH, len(self.labels) - start))

        return one
