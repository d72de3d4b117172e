"""One task of any method: passes, optimiser steps and timings, with Lightning Fabric."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duallora.backbones.compiling import compiler_errors
from duallora.data.assembly import Chunk
from duallora.data.colours import Colours
from duallora.data.loader import ImageLoader
from duallora.data.source import Source
from duallora.data.transforms import Augmentation, EvaluationTransform
from duallora.errors import DualLoRAError, is_low_memory
from duallora.methods import Batch, Method, MethodConfig, TaskInfo
from duallora.methods.best_epoch import BestEpoch
from duallora.methods.class_weights import balanced
from duallora.methods.config import epochs_for
from duallora.methods.pieces import Pieces
from duallora.methods.schedules import rate_share
from duallora.runtime import parallel
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress
from duallora.streams import TaskDataset

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Timings:
    """Seconds of the three parts of a task, and what came of its training; fields as in ``TaskRecord``."""

    prepare_seconds: float
    learn_seconds: float
    consolidate_seconds: float
    trainable_parameters: int
    epochs: int
    kept_epoch: int
    kept_accuracy: float | None
    kept_images: int


class _Trained(NamedTuple):
    """Number of trained parameters, epochs, the one that was kept, and held-back images right after it."""

    parameters: int = 0
    epochs: int = 0
    kept: int = 0
    right: int | None = None


def batches(
    loader: ImageLoader,
    source: Source,
    data: TaskDataset,
    chunks: Iterable[Chunk],
    total: int,
    colours: Colours | None = None,
) -> Generator[Batch, None, None]:
    """Batches of a data set on the loader's device, with labels and indices.

    Args:
        loader: has the data set open.
        source: that data set.
        data: the same, for its targets.
        chunks: which samples are in which batch.
        total: samples in all chunks together.
        colours: changes the views of an epoch.
    """
    asked, shown = itertools.tee(chunks)
    with closing(loader.batches(source, asked, total)) as found:
        for chunk, images in zip(shown, found, strict=True):
            labels = [data.targets[position] for position in chunk.positions]
            if colours is not None:
                images = colours(images, chunk.positions, chunk.epoch)
            yield Batch(images, loader.sent(labels), loader.sent(chunk.positions))


def evaluated(positions: Sequence[int]) -> list[Chunk]:
    """The batches of a pass without gradients."""
    return [Chunk(tuple(part)) for part in chunked(positions, EVALUATION_BATCH)]


def chunked(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """Positions in chunks of a size, the last one may be smaller."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def learn_task(
    method: Method,
    task: TaskInfo,
    data: TaskDataset,
    held_back: TaskDataset | None,
    augmentation: Augmentation,
    evaluation: EvaluationTransform,
    machine: Machine,
    loader: ImageLoader,
    progress: Progress,
) -> Timings:
    """Runs the hooks of ``method`` on one task.

    Args:
        method: learns; its state changes in place.
        task: index, name and classes.
        data: training images with targets in ``range(len(task.classes))``.
        held_back: other images of the task's classes, with targets alike; the epoch that names the most of
            them is kept. None keeps the last.
        augmentation: view of a training sample by epoch and index.
        evaluation: view of a sample in the passes without gradients.
        machine: device, processes and precision.
        loader: reads the images, which are kept until the end of the task.
        progress: where to report.

    Raises:
        DualLoRAError: fewer images than processes, or a training that diverged.
    """
    parallel.require_enough(len(data), task.name)
    with ExitStack() as opened:
        source = opened.enter_context(loader.reading(data, evaluation, augmentation, keep="images"))
        judge = None
        if held_back is not None:
            other = opened.enter_context(loader.reading(held_back, evaluation, keep="images"))
            judge = _Judge(loader, other, held_back)
        return _learned(method, task, data, judge, source, machine, loader, progress)


def _learned(
    method: Method,
    task: TaskInfo,
    data: TaskDataset,
    judge: _Judge | None,
    source: Source,
    machine: Machine,
    loader: ImageLoader,
    progress: Progress,
) -> Timings:
    share = parallel.share(len(data))
    own = evaluated(share)

    def passes(label: str) -> Callable[[], Iterator[Batch]]:
        def one() -> Iterator[Batch]:
            with closing(batches(loader, source, data, own, len(share))) as found:
                yield from progress.track(found, len(own), f"{task.name}: {label}")

        return one

    clock = _Clock(machine.device)
    method.prepare(task, passes("looking at the images"))
    prepared = clock.lap()
    trained, groups = _Trained(), method.parameter_groups()
    if groups and len(task.classes) > 1:
        method.class_loss.weights = _class_weights(method, data)
        trained = _train(method, groups, task, data, judge, source, machine, loader, progress)
        method.class_loss.weights = None
    elif groups:
        progress.line(
            f"{task.name}: a single class has nothing to tell apart; "
            "its statistics are learned, training is skipped"
        )
    learned = clock.lap()
    method.consolidate(task, passes("remembering"))
    images = 0 if judge is None or trained.right is None else len(judge.data)
    accuracy = trained.right / images if images and trained.right is not None else None
    return Timings(prepared, learned, clock.lap(), *trained[:3], accuracy, images)


@dataclass(frozen=True)
class _Judge:
    """Images held back to choose an epoch by, open in the loader."""

    loader: ImageLoader
    source: Source
    data: TaskDataset

    @torch.no_grad()
    def right(self, method: Method) -> int:
        """How many images the head that is trained names rightly, among the classes of the task."""
        chunks, count = evaluated(range(len(self.data))), torch.zeros((), dtype=torch.long)
        with closing(batches(self.loader, self.source, self.data, chunks, len(self.data))) as found:
            for batch in found:
                count = count + (method.current_logits(batch.images).argmax(1) == batch.labels).sum().cpu()
        return int(count)


def _class_weights(method: Method, data: TaskDataset) -> Tensor | None:
    if method.config.class_weights == "none":
        return None
    weights = balanced(data.targets, len(data.classes))
    return None if weights is None else weights.to(method.device)


def _train(
    method: Method,
    groups: list[dict[str, Any]],
    task: TaskInfo,
    data: TaskDataset,
    judge: _Judge | None,
    source: Source,
    machine: Machine,
    loader: ImageLoader,
    progress: Progress,
) -> _Trained:
    """The optimiser's steps on shuffled augmented views; leaves the parameters of the best epoch."""
    config, fabric = method.config, machine.fabric
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    parallel.copy_from_first(trained)
    epochs = epochs_for(config, len(data), task.index)
    plain, schedule = make_optimizer(groups, config, math.ceil(len(data) / config.step_images), epochs)
    optimizer: Any = fabric.setup_optimizers(plain)
    gradients = partial(_gradients, method, fabric, optimizer)
    fitting = Pieces(config.batch_size == "auto" and machine.device.type == "cuda")
    best = BestEpoch(trained, epochs)

    def steps(epoch: int) -> list[list[tuple[Sequence[int], float]]]:
        wholes = chunked(_order(len(data), method.seed, task.index, epoch), config.step_images)
        return [_pieces(whole, machine.compute.accumulate) for whole in wholes]

    # One pass of the loader: the first images of an epoch are prepared in the one before.
    chunks = (
        Chunk(tuple(piece), epoch) for epoch in range(epochs) for own in steps(epoch) for piece, _ in own
    )
    total = epochs * sum(len(piece) for own in steps(0) for piece, _ in own)
    # What a head trained for this alone leads has to carry over to classes that come later: no colour of a
    # few images may stand for a class. Crops alone show them too much alike.
    crops = source.augmentation
    led = method.leader is not None
    colours = Colours(crops) if led and crops is not None and crops.policy != "none" else None
    with closing(batches(loader, source, data, chunks, total, colours)) as found:
        for epoch in range(epochs):
            pieces = steps(epoch)
            label = f"{task.name}: epoch {epoch + 1}/{epochs}"
            for own in progress.track(pieces, len(pieces), label):
                drawn = [(next(found), share) for _, share in own]
                with _enough_memory(config.step_images):
                    try:
                        loss = fitting.run(drawn, gradients)
                    # Of the way back, where a backend's own error comes as it is; the backbone sees to the
                    # way there. A fault of another kind comes again without the compiler.
                    except Exception as error:
                        if not method.backbone.compiled or is_low_memory(error):
                            raise
                        if not isinstance(error, (*compiler_errors(), RuntimeError)):
                            raise
                        method.backbone.leave_uncompiled(error)
                        loss = fitting.run(drawn, gradients)
                parallel.sum_gradients(trained)
                optimizer.step()
                if progress.recording:
                    progress.record(_step_figures(loss, schedule.get_last_lr()), steps=1)
                schedule.step()
                method.after_step()
            if not all(bool(p.isfinite().all()) for p in trained):  # once an epoch: a GPU has to wait for it
                raise DualLoRAError(
                    f"training of {task.name!r} diverged in epoch {epoch + 1}; lower the learning rates "
                    "(--method.learning_rate, --method.head_learning_rate)."
                )
            if judge is not None and best.due(epoch + 1):
                best.note(epoch + 1, judge.right(method))
    optimizer.zero_grad()  # gradients would stay as long as their parameters
    parameters = sum(p.numel() for p in trained)
    if judge is None:
        return _Trained(parameters, epochs, epochs)
    kept, right = best.restore()
    parallel.copy_from_first(trained)  # rounding must not make processes keep different epochs
    return _Trained(parameters, epochs, kept, right)


@contextmanager
def _enough_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_low_memory(error):
            raise
        raise DualLoRAError(
            f"there is not enough memory for a batch of {batch_size} images; lower --method.batch_size, give "
            "it the value auto on a GPU, or compute each batch in pieces with --accumulate."
        ) from error


def _gradients(
    method: Method, fabric: Fabric, optimizer: Any, drawn: Sequence[tuple[Batch, float]]
) -> Tensor:
    """Gradients of a batch from its pieces, each with its share; returns the mean loss of these images."""
    optimizer.zero_grad()
    losses = []
    for batch, share in drawn:
        loss = method.loss(batch) * share
        fabric.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum() / max(sum(share for _, share in drawn), 1e-12)


def _step_figures(loss: Tensor, rates: Sequence[float | Tensor]) -> dict[str, float]:
    """Loss and learning rates of a step; the first group of parameters is the heads'."""
    names = ("rate/heads", "rate/adapters", *(f"rate/adapters {n}" for n in range(2, len(rates))))
    return {"loss": float(loss), **dict(zip(names, map(float, rates), strict=False))}


def make_optimizer(
    groups: list[dict[str, Any]], config: MethodConfig, steps: int, epochs: int
) -> tuple[Optimizer, LRScheduler]:
    """The optimiser over a task's parameters, and its schedule over ``epochs`` of ``steps`` steps each."""
    total = epochs * steps
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=0.9),
    }
    optimizer: Optimizer = kinds[config.optimizer](groups, weight_decay=config.weight_decay)  # type: ignore[operator]
    if config.schedule == "cosine":  # the same numbers as by its formula but for rounding
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)

    def share(step: int) -> float:
        return rate_share(config.schedule, step, total, epochs)

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
