"""What is measured: calls of prediction, and a task in training whose steps can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.backbones.compiling import any_batch
from duallora.bench.synthetic import RandomTask, simulated_learner, task_info
from duallora.learner import ContinualLearner
from duallora.methods import METHODS, MethodConfig, method_name
from duallora.runtime.compute import Machine
from duallora.training import make_optimizer

REFERENCE = "backbone"
"""The line that prediction is compared with: the bare backbone, without heads, rows and adapters."""

PLAIN = "lora"
"""The method that training is compared with."""

_RATE = 1e-6  # the time of a step does not depend on it, and weights stay what they are


@dataclass(frozen=True)
class Candidate:
    """A line of the measurement.

    Attributes:
        name: of the line.
        config: of its method.
    """

    name: str
    config: MethodConfig

    @property
    def method(self) -> str:
        """The registered name of the method."""
        return method_name(self.config)

    @property
    def at_once(self) -> bool:
        """Whether the method learns all classes as one task."""
        return METHODS[self.method].method.all_at_once

    def learned(self, backbone: Backbone, tasks: int, classes: int, machine: Machine) -> ContinualLearner:
        """A learner as if it had learned so many tasks; it predicts in the machine's precision."""
        return simulated_learner(backbone, self.config, tasks, classes, device=machine, exact_readouts=False)


def bare(backbone: Backbone, machine: Machine) -> Callable[[Tensor], Tensor]:
    """The backbone's pass up to its final feature, as timm has it."""
    model: Any = backbone.to(machine.device).model

    def features(images: Tensor) -> Tensor:
        found: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        return found

    made: Callable[[Tensor], Tensor] = torch.compile(features) if machine.compute.compile else features

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        if machine.compute.compile:
            any_batch(images)
        with machine.autocast(machine.compute.compile):
            return made(images)

    return call


class Training:
    """A candidate that learns its task number ``tasks``: a step can be repeated, the passes run once.

    Args:
        candidate: the line.
        backbone: not taken yet.
        tasks: T; those before are synthetic. A method that learns all at once has a single one.
        classes: of a task.
        images: of the task, at least two of a class.
        batch: images of a step; 0 takes the method's own.
        machine: where it computes.
    """

    def __init__(
        self,
        candidate: Candidate,
        backbone: Backbone,
        tasks: int,
        classes: int,
        images: int,
        batch: int,
        machine: Machine,
    ) -> None:
        before, classes = (0, classes * tasks) if candidate.at_once else (tasks - 1, classes)
        self.learner = simulated_learner(backbone, candidate.config, before, classes, device=machine)
        self.method, self.machine = self.learner.method, machine
        self.batch = batch or candidate.config.step_images
        info, size = task_info(before, classes), backbone.info.input_size
        self.task = RandomTask(info, max(images, 2 * classes), size, machine.device)
        self.first = before == 0
        self.optimizer: Any = None
        self._position = 0

    @property
    def trains(self) -> bool:
        """Whether the method trains anything; known once it is prepared."""
        return self.optimizer is not None

    @property
    def trainable(self) -> int:
        """Parameters that a step moves."""
        groups = self.optimizer.param_groups if self.trains else []
        return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)

    def prepare(self) -> None:
        """What the method does before training."""
        self.method.prepare(self.task.info, self.task.loader)
        groups = self.method.parameter_groups()
        if groups:
            slow = [group | {"lr": _RATE} for group in groups]
            plain, _ = make_optimizer(slow, self.method.config, 1, 1)
            self.optimizer = self.machine.fabric.setup_optimizers(plain)

    def step(self) -> None:
        """One step of the optimiser on the next images."""
        self.optimizer.zero_grad()
        self.gradients()
        self.optimizer.step()
        self.method.after_step()

    def gradients(self) -> None:
        """Loss and gradients of the next images."""
        batch = self.task.batch(self._position, self.batch)
        self._position += self.batch
        self.machine.fabric.backward(self.method.loss(batch))

    def consolidate(self) -> None:
        """What the method does after training."""
        self.method.consolidate(self.task.info, self.task.loader)
