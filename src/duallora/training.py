"""One task of any method: passes, optimiser steps and timings, with Lightning Fabric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from duallora.data.transforms import Augmentation
from duallora.errors import DualLoRAError
from duallora.methods import Batch, Method, MethodConfig, TaskInfo
from duallora.methods.config import epochs_for
from duallora.methods.schedules import rate_share
from duallora.runtime import parallel
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress
from duallora.streams import TaskDataset

EVALUATION_BATCH = 64
_FEW = 256  # images that are decoded sooner than workers start


@dataclass(frozen=True)
class Timings:
    """Seconds of the three parts of a task, and how many parameters it trained."""

    prepare_seconds: float
    learn_seconds: float
    consolidate_seconds: float
    trainable_parameters: int


class _Views(Dataset[tuple[Tensor, int, int]]):
    """Samples as tensors, with label and index; ``epoch`` None gives the evaluation view."""

    def __init__(self, data: TaskDataset, view: Callable[[Any, int], Tensor]) -> None:
        self.data, self.view = data, view

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self.data[index]
        return self.view(image, index), label, index


def batches(
    data: TaskDataset,
    view: Callable[[Any, int], Tensor],
    machine: Machine,
    chunks: Sequence[Sequence[int]],
) -> Iterator[Batch]:
    """Batches of a data set on a device: the samples at the positions of each chunk.

    Workers have no part in any result, because every random draw is keyed by the sample. Data set and view
    have to be picklable: where processes are not forks, workers get them so.
    """
    gpu = machine.device.type == "cuda"
    loader = DataLoader(
        _Views(data, view),
        batch_sampler=chunks,  # type: ignore[arg-type]  # it is only gone through, and has a length
        num_workers=machine.workers if sum(map(len, chunks)) > _FEW else 0,
        pin_memory=gpu,
        # A loader draws a seed for its workers, from the global generator unless it has one of its own.
        generator=torch.Generator(),
    )
    for images, labels, indices in loader:
        yield Batch(*(x.to(machine.device, non_blocking=gpu) for x in (images, labels, indices)))


def unaugmented(evaluation: Callable[[Any], Tensor]) -> Callable[[Any, int], Tensor]:
    """A view for `batches` that depends on the image alone."""
    return partial(_evaluated, evaluation)


def chunked(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """Positions in chunks of a size, the last one may be smaller."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def learn_task(
    method: Method,
    task: TaskInfo,
    data: TaskDataset,
    augmentation: Augmentation,
    evaluation: Callable[[Any], Tensor],
    machine: Machine,
    progress: Progress,
) -> Timings:
    """Runs the hooks of ``method`` on one task.

    Args:
        method: learns; its state changes in place.
        task: index, name and classes.
        data: training images with targets in ``range(len(task.classes))``.
        augmentation: view of a training sample by epoch and index.
        evaluation: view of a sample in the passes without gradients.
        machine: device, processes and precision.
        progress: where to report.

    Raises:
        DualLoRAError: fewer images than processes, or a training that diverged.
    """
    parallel.require_enough(len(data), task.name)
    own = chunked(parallel.share(len(data)), EVALUATION_BATCH)

    def passes(label: str) -> Callable[[], Iterator[Batch]]:
        def one() -> Iterator[Batch]:
            found = batches(data, unaugmented(evaluation), machine, own)
            yield from progress.track(found, len(own), f"{task.name}: {label}")

        return one

    clock = _Clock(machine.device)
    method.prepare(task, passes("looking at the images"))
    prepared = clock.lap()
    trained, groups = 0, method.parameter_groups()
    if groups and len(task.classes) > 1:
        trained = _train(method, groups, task, data, augmentation, machine, progress)
    elif groups:
        progress.line(
            f"{task.name}: a single class has nothing to tell apart; "
            "its statistics are learned, training is skipped"
        )
    learned = clock.lap()
    method.consolidate(task, passes("remembering"))
    return Timings(prepared, learned, clock.lap(), trained)


def _train(
    method: Method,
    groups: list[dict[str, Any]],
    task: TaskInfo,
    data: TaskDataset,
    augmentation: Augmentation,
    machine: Machine,
    progress: Progress,
) -> int:
    """The optimiser's steps on shuffled augmented views; returns the number of trained parameters."""
    config, fabric = method.config, machine.fabric
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    parallel.copy_from_first(trained)
    epochs = epochs_for(config, len(data))
    plain, schedule = make_optimizer(groups, config, epochs * math.ceil(len(data) / config.batch_size))
    optimizer: Any = fabric.setup_optimizers(plain)
    for epoch in range(epochs):
        wholes = chunked(_order(len(data), method.seed, task.index, epoch), config.batch_size)
        pieces = [_pieces(whole, machine.compute.accumulate) for whole in wholes]
        view = partial(_augmented, augmentation, epoch)
        found = batches(data, view, machine, [piece for own in pieces for piece, _ in own])
        label = f"{task.name}: epoch {epoch + 1}/{epochs}"
        for own in progress.track(pieces, len(pieces), label):
            optimizer.zero_grad()
            for (_, share), batch in zip(own, found, strict=False):
                fabric.backward(method.loss(batch) * share)
            parallel.sum_gradients(trained)
            optimizer.step()
            schedule.step()
            method.after_step()
        if not all(bool(p.isfinite().all()) for p in trained):  # once an epoch: a GPU has to wait for it
            raise DualLoRAError(
                f"training of {task.name!r} diverged in epoch {epoch + 1}; lower the learning rates "
                "(--method.learning_rate, --method.head_learning_rate)."
            )
    optimizer.zero_grad()  # gradients would stay as long as their parameters
    return sum(p.numel() for p in trained)


def make_optimizer(
    groups: list[dict[str, Any]], config: MethodConfig, steps: int
) -> tuple[Optimizer, LRScheduler]:
    """The optimiser over a task's parameters, and its schedule over all steps."""
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=0.9),
    }
    optimizer: Optimizer = kinds[config.optimizer](groups, weight_decay=config.weight_decay)  # type: ignore[operator]
    if config.schedule == "cosine":  # the same numbers as by its formula but for rounding
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    def share(step: int) -> float:
        return rate_share(config.schedule, step, steps, config.epochs)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _pieces(batch: Sequence[int], accumulate: int) -> list[tuple[Sequence[int], float]]:
    """What this process computes of a batch, piece by piece, with each piece's share of the batch.

    The loss is a mean over images, so that shares of it add up to that of the batch. A process for which no
    image is left computes one of them at no weight: all have to take part in the sum of the gradients.
    """
    own = [batch[i] for i in parallel.share(len(batch))]
    if not own:
        return [(batch[:1], 0.0)]
    parts = min(accumulate, len(own))
    blocks = [parallel.block(len(own), part, parts) for part in range(parts)]
    return [([own[i] for i in block], len(block) / len(batch)) for block in blocks]


def _evaluated(evaluation: Callable[[Any], Tensor], image: Any, _: int) -> Tensor:
    return evaluation(image)


def _augmented(augmentation: Augmentation, epoch: int, image: Any, index: int) -> Tensor:
    return augmentation(image, epoch, index)


def _order(size: int, seed: int, task: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + task) * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, the device's queue included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
