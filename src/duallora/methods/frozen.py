"""Controls on the frozen backbone: linear heads alone, or with the class rows and calibration of DualLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.interface import Loader, TaskInfo


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Fields of the linear probe: those of every method."""


@dataclass(frozen=True)
class FrozenConfig(MethodConfig):
    """Fields of frozen features with rows and calibration: those of every method."""


class Linear(Method):
    """Linear probe: no adapters, arg-max over the concatenated heads."""

    paper = "linear probe"
    leaves = "its share of the pooled covariance"
    config: LinearConfig

    def extract(self, images: Tensor) -> Tensor:
        """Features of the bare backbone; those of augmented views, on which heads train, are never kept."""
        return super().extract(images) if torch.is_grad_enabled() else self.frozen_features(images)


class Frozen(Method):
    """No adapters; heads, rows and calibration as in DualLoRA: what the adapters are measured against."""

    paper = "frozen features"
    leaves = "its share of the pooled covariance"
    config: FrozenConfig
    readout: ClassVar[Literal["heads", "calibrated"]] = "calibrated"
    imprinted: ClassVar[bool] = True

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """One pass: the head starts as the classifier of the task's rows."""
        super().prepare(task, loader)
        self.imprint(task, *self.observe(loader))

    def extract(self, images: Tensor) -> Tensor:
        """Features of the bare backbone; those of augmented views, on which heads train, are never kept."""
        return super().extract(images) if torch.is_grad_enabled() else self.frozen_features(images)
