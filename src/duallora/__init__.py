"""DualLoRA: a pre-trained Vision Transformer learns tasks one after another, without keeping old images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duallora import streams
    from duallora.backbones.backbone import Backbone, load_backbone
    from duallora.errors import CheckFailed, DualLoRAError
    from duallora.learner import ContinualLearner
    from duallora.methods import METHODS, MethodConfig
    from duallora.methods.duallora_config import DualLoRAConfig
    from duallora.methods.frozen import FrozenConfig, LinearConfig
    from duallora.methods.lora import LoRAConfig
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

_HOME = {
    "backbones.backbone": ("Backbone", "load_backbone"),
    "errors": ("CheckFailed", "DualLoRAError"),
    "learner": ("ContinualLearner",),
    "methods": ("METHODS", "MethodConfig"),
    "methods.duallora_config": ("DualLoRAConfig",),
    "methods.frozen": ("FrozenConfig", "LinearConfig"),
    "methods.lora": ("LoRAConfig",),
    "outputs": ("Evaluation", "Prediction", "TaskRecord"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import, and `duallora --help` or an early Ctrl-C must not wait for it.
    if name == "streams":
        return importlib.import_module("duallora.streams")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"duallora.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
