"""The measurement: every candidate at every number of tasks, in training and in prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone, BackboneInfo
from duallora.bench import exported
from duallora.bench.candidates import PLAIN, REFERENCE, Candidate, Training, bare
from duallora.bench.counts import flops, held_bytes, images_seen, peak_bytes, state_bytes
from duallora.bench.timing import medians, seconds
from duallora.bench.unfinished import Unfinished
from duallora.learner import ContinualLearner
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress

EPOCHS = 20
"""Passes over the images that ``passes_share`` is given for."""

Row = dict[str, Any]
Image = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        candidates: the lines beside the bare backbone.
        tasks: numbers of tasks learned.
        batches: images of a prediction.
        classes: of a task.
        images: of the task that is trained; 0 measures prediction alone.
        training_batch: images of a step; 0 takes each method's own.
        repeats: samples of which the median is taken.
        exports: formats in which ``duallora`` lines are also measured as an exported file.
    """

    candidates: Sequence[Candidate]
    tasks: Sequence[int]
    batches: Sequence[int]
    classes: int
    images: int
    training_batch: int
    repeats: int
    exports: Sequence[str] = ()


@dataclass(frozen=True)
class _Filled:
    """Candidates that predict: their calls, what holds their tensors, and what is known of them."""

    calls: dict[str, Image]
    owners: dict[str, object]
    about: dict[str, Row]


class Bench:
    """Runs a plan.

    Args:
        plan: what is measured.
        backbone: gives a new copy of the backbone.
        machine: where it is measured.
        progress: where to report.
        unfinished: where every part is written once it is measured.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Callable[[], Backbone],
        machine: Machine,
        progress: Progress,
        unfinished: Unfinished,
    ) -> None:
        self.plan, self.machine, self.progress, self.unfinished = plan, machine, progress, unfinished
        self.device = machine.device
        self._loaded = backbone  # a copy is made much faster than another one with its initialisation
        self.info: BackboneInfo = self._pristine.info

    def rows(self) -> list[Row]:
        """One row a candidate, number of tasks and batch; figures of training stand in each of its rows."""
        rows: list[Row] = []
        for tasks in self.plan.tasks:
            with self._every_candidate_compiled():
                training = partial(self._training, tasks)
                trained = (
                    self.unfinished.measured(f"{_counted(tasks)}, training", training)
                    if self.plan.images
                    else {}
                )
                predicted = self._prediction(tasks)
            rows += [row | trained.get(row["method"], {}) for row in predicted]
        return rows

    def backbone(self) -> Backbone:
        """A new copy of the backbone."""
        return copy.deepcopy(self._pristine)

    @cached_property
    def _pristine(self) -> Backbone:
        return self._loaded()

    @contextmanager
    def _every_candidate_compiled(self) -> Iterator[None]:
        """All candidates share the backbone's code, and dynamo compiles one piece of code only 8 times."""
        if not self.machine.compute.compile:
            yield
            return
        import torch._dynamo.config as dynamo

        torch.compiler.reset()
        with dynamo.patch(
            recompile_limit=4096, accumulated_recompile_limit=1 << 16, fail_on_recompile_limit_hit=True
        ):
            yield

    # -- training --------------------------------------------------------------------------------------------

    def _training(self, tasks: int) -> dict[str, Row]:
        plan, found = self.plan, dict[str, Row]()
        trainings: dict[str, Training] = {}
        for candidate in plan.candidates:
            self.progress.line(f"{_counted(tasks)}, training: {candidate.name} is prepared")
            training = Training(
                candidate,
                self.backbone(),
                tasks,
                plan.classes,
                plan.images,
                plan.training_batch,
                self.machine,
            )
            trainings[candidate.name] = training
            found[candidate.name] = self._prepared(training)
        steps = {name: training.step for name, training in trainings.items() if training.trains}
        self.progress.line(f"{_counted(tasks)}, training: {len(steps)} candidates step in turn")
        for name, took in medians(steps, self.device, plan.repeats, warmup=self._warmup).items():
            found[name] |= {"training_seconds": took} | self._step_counts(trainings[name])
        for name, training in trainings.items():
            self.progress.line(f"{_counted(tasks)}, training: {name} is consolidated")
            found[name] |= self._consolidated(training, found[name])
        _ratios(found, PLAIN, "training_seconds", "training_ratio")
        _ratios(found, PLAIN, "training_flops", "training_flops_ratio")
        _ratios(found, PLAIN, "training_peak_bytes", "training_peak_ratio")
        return found

    def _prepared(self, training: Training) -> Row:
        before = None if training.first else state_bytes(training.method.state())
        # Lightning is imported by whoever trains first, and that is part of nobody's preparation.
        _ = self.machine.fabric
        with torch.no_grad(), self._eager():
            training.learner.backbone(self._images(2))
        with self._counted(training.learner) as passes:
            took = seconds(training.prepare, self.device)
        return {"prepare_seconds": took, "_before": before, "_passes": passes}

    def _step_counts(self, training: Training) -> Row:
        with self._eager():
            work = flops(training.gradients)
        training.optimizer.zero_grad()  # a step begins so; gradients that it frees are not to count twice
        held = held_bytes(training.method, training.optimizer, device=self.device)
        return {
            "training_batch": training.batch,
            "training_flops": work,
            "training_peak_bytes": held + peak_bytes(training.step, self.device),
            "trainable_parameters": training.trainable,
        }

    def _consolidated(self, training: Training, found: Row) -> Row:
        before, passes = found.pop("_before"), found.pop("_passes")
        with self._counted(training.learner) as more:
            took = seconds(training.consolidate, self.device)
        images, after = len(training.task.labels), state_bytes(training.method.state())
        counted = None if passes is None or more is None else (passes[0] + more[0]) / images
        row: Row = {
            "task_images": images,
            "consolidate_seconds": took,
            "data_passes": training.task.passes,
            "backbone_passes": counted,
            "stored_bytes": after,
            "stored_bytes_per_task": None if before is None else after - before,
        }
        if "training_seconds" in found:
            epoch = found["training_seconds"] * -(-images // training.batch)
            row["passes_share"] = (found["prepare_seconds"] + took) / (EPOCHS * epoch)
        return row

    @contextmanager
    def _counted(self, learner: ContinualLearner) -> Iterator[list[int] | None]:
        """Images that enter the backbone inside; None for a compiled one, which has no place to count."""
        if self.machine.compute.compile:
            yield None
            return
        counted: list[int] = []
        with images_seen(learner.backbone) as seen:
            yield counted
        counted.append(seen.images)

    # -- prediction ------------------------------------------------------------------------------------------

    def _prediction(self, tasks: int) -> list[Row]:
        filled = cache(lambda: self._filled(tasks))  # only for what is not measured yet

        def measured(batch: int) -> list[Row]:
            return self._batch(tasks, batch, filled())

        rows: list[Row] = []
        for batch in self.plan.batches:
            rows += self.unfinished.measured(f"{_counted(tasks)}, batch {batch}", partial(measured, batch))
        return rows

    def _filled(self, tasks: int) -> _Filled:
        """The candidates as if they had learned so many tasks."""
        plan, reference = self.plan, self.backbone()
        calls: dict[str, Image] = {REFERENCE: bare(reference, self.machine)}
        owners: dict[str, object] = {REFERENCE: reference}
        about: dict[str, Row] = {REFERENCE: {"stored_bytes": 0, "forward_passes": 1}}
        for candidate in plan.candidates:
            self.progress.line(f"{_counted(tasks)}, prediction: {candidate.name} is filled")
            learner = candidate.learned(self.backbone(), tasks, plan.classes, self.machine)
            calls[candidate.name], owners[candidate.name] = learner.method.logits, learner.method
            about[candidate.name] = {
                "stored_bytes": state_bytes(learner.method.state()),
                "forward_passes": self._passes(learner),
            }
            if candidate.method == "duallora":
                for form in plan.exports:
                    self.progress.line(f"{_counted(tasks)}, prediction: {candidate.name} is exported")
                    calls[f"{candidate.name} ({form})"] = exported.runner(learner, form)
        return _Filled(calls, owners, about)

    def _batch(self, tasks: int, batch: int, filled: _Filled) -> list[Row]:
        calls, owners, about = filled.calls, filled.owners, filled.about
        images = self._images(batch)
        timed = {name: partial(call, images) for name, call in calls.items()}
        rows: dict[str, Row] = {}
        took = medians(timed, self.device, self.plan.repeats, warmup=self._warmup)
        for name, call in timed.items():
            rows[name] = {
                "method": name,
                "backbone": self.info.name,
                "tasks": tasks,
                "batch": batch,
                "device": self.device.type,
                "precision": self.machine.precision,
                "compiled": self.machine.compute.compile,
                "synthetic": name != REFERENCE,
                "prediction_seconds": took[name],
                "images_per_second": batch / took[name],
                **about.get(name, {}),
            }
            if name in owners:
                with self._eager(), torch.no_grad():
                    rows[name]["flops_per_image"] = flops(call) // batch
                held = held_bytes(owners[name], device=self.device)
                rows[name]["prediction_peak_bytes"] = held + peak_bytes(call, self.device)
        _ratios(rows, REFERENCE, "prediction_seconds", "prediction_ratio")
        _ratios(rows, REFERENCE, "flops_per_image", "flops_ratio")
        return list(rows.values())

    def _passes(self, learner: ContinualLearner) -> float:
        """Backbone passes of a prediction, counted; as the method says where the backbone is compiled."""
        if self.machine.compute.compile:
            return learner.forward_passes
        with images_seen(learner.backbone) as seen:
            learner.method.logits(self._images(2))
        return seen.images / 2

    def _images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, *self.info.input_size, generator=generator).to(self.device)

    def _eager(self) -> AbstractContextManager[Any]:
        """Inside, nothing runs compiled: operations are counted where they can be seen."""
        return torch.compiler.set_stance("force_eager") if self.machine.compute.compile else nullcontext()

    @property
    def _warmup(self) -> int:
        return 3 if self.machine.compute.compile else 2


def _counted(tasks: int) -> str:
    return f"{tasks} task{'s' if tasks > 1 else ''}"


def _ratios(rows: Mapping[str, Row], reference: str, figure: str, ratio: str) -> None:
    """Adds a figure of every row over that of the reference, where both are there."""
    base = rows.get(reference, {}).get(figure)
    for row in rows.values():
        row[ratio] = row[figure] / base if base and row.get(figure) is not None else None
