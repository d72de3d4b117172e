"""One task of any method: passes, optimiser steps and timings, with Lightning Fabric."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duallora.errors import DualLoRAError
from duallora.methods import Batch, Method, TaskInfo
from duallora.progress import Progress
from duallora.streams import TaskDataset
from duallora.transforms import Augmentation

EVALUATION_BATCH = 64


def make_fabric(device: str) -> Fabric:
    """Fabric on one device, with bf16 autocast where the device computes in it.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        DualLoRAError: if the device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device, False):
        usable = ", ".join(name for name, found in there.items() if found)
        raise DualLoRAError(f"device {device!r} is not available on this machine; take auto, {usable}.")
    # As a plugin, because precision="bf16-mixed" makes Fabric announce it on stderr at every start.
    plugin = MixedPrecision("bf16-mixed", device) if _computes_in_bf16(device) else Precision()
    return Fabric(accelerator=device, devices=1, plugins=plugin)


def _computes_in_bf16(device: str) -> bool:
    """Whether the device has instructions for bf16 products; where it would emulate them, fp32 is faster."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


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
    size: int,
    device: torch.device,
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of a data set on a device, in order or in the given order; the last one may be smaller.

    Workers decode only beside a GPU: on a CPU they would compete with the model for the same cores. They have
    no part in any result, because every random draw is keyed by the sample.
    """
    gpu = device.type == "cuda"
    loader = DataLoader(
        _Views(data, view),
        batch_size=size,
        sampler=order,
        num_workers=min(8, os.cpu_count() or 1) if gpu and len(data) > 256 else 0,
        pin_memory=gpu,
        # A loader draws a seed for its workers, from the global generator unless it has one of its own.
        generator=torch.Generator(),
    )
    for images, labels, indices in loader:
        yield Batch(*(x.to(device, non_blocking=gpu) for x in (images, labels, indices)))


def learn_task(
    method: Method,
    task: TaskInfo,
    data: TaskDataset,
    augmentation: Augmentation,
    evaluation: Callable[[Any], Tensor],
    fabric: Fabric,
    progress: Progress,
) -> Timings:
    """Runs the hooks of ``method`` on one task.

    Args:
        method: learns; its state changes in place.
        task: index, name and classes.
        data: training images with targets in ``range(len(task.classes))``.
        augmentation: view of a training sample by epoch and index.
        evaluation: view of a sample in the passes without gradients.
        fabric: device and precision.
        progress: where to report.
    """

    def passes(label: str) -> Callable[[], Iterator[Batch]]:
        def one() -> Iterator[Batch]:
            found = batches(data, lambda image, _: evaluation(image), EVALUATION_BATCH, fabric.device)
            yield from progress.track(found, math.ceil(len(data) / EVALUATION_BATCH), f"{task.name}: {label}")

        return one

    clock = _Clock(fabric.device)
    method.prepare(task, passes("looking at the images"))
    prepared = clock.lap()
    trained, groups = 0, method.parameter_groups()
    if groups and len(task.classes) > 1:
        trained = _train(method, groups, task, data, augmentation, fabric, progress)
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
    fabric: Fabric,
    progress: Progress,
) -> int:
    """Adam with one cosine to zero over all steps; returns the number of trained parameters."""
    config = method.config
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    adam = torch.optim.Adam(groups)
    steps = config.epochs * math.ceil(len(data) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps)
    optimizer: Any = fabric.setup_optimizers(adam)
    for epoch in range(config.epochs):
        order = _order(len(data), method.seed, task.index, epoch)
        view = partial(_augmented, augmentation, epoch)
        found = batches(data, view, config.batch_size, fabric.device, order)
        label = f"{task.name}: epoch {epoch + 1}/{config.epochs}"
        for batch in progress.track(found, math.ceil(len(data) / config.batch_size), label):
            optimizer.zero_grad()
            fabric.backward(method.loss(batch))
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
