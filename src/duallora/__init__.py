"""DualLoRA: a pre-trained Vision Transformer learns tasks one after another, without keeping old images."""

from __future__ import annotations

from duallora import streams
from duallora.backbones import Backbone, load_backbone
from duallora.errors import CheckFailed, DualLoRAError
from duallora.learner import ContinualLearner
from duallora.methods import METHODS, DualLoRAConfig, FrozenConfig, LinearConfig, LoRAConfig, MethodConfig
from duallora.outputs import Evaluation, Prediction, TaskRecord

__all__ = [
    "METHODS",
    "Backbone",
    "CheckFailed",
    "ContinualLearner",
    "DualLoRAConfig",
    "DualLoRAError",
    "Evaluation",
    "FrozenConfig",
    "LinearConfig",
    "LoRAConfig",
    "MethodConfig",
    "Prediction",
    "TaskRecord",
    "load_backbone",
    "streams",
]
