"""The methods by the name they have on the command line."""

from __future__ import annotations

from typing import NamedTuple

from duallora.errors import DualLoRAError
from duallora.methods.base import Batch, Loader, Method, Readout, TaskInfo
from duallora.methods.config import MethodConfig
from duallora.methods.duallora import DualLoRA, DualLoRAConfig
from duallora.methods.frozen import Frozen, FrozenConfig, Linear, LinearConfig
from duallora.methods.lora import LoRA, LoRAConfig


class MethodEntry(NamedTuple):
    """Configuration and class of a method."""

    config: type[MethodConfig]
    method: type[Method]


METHODS: dict[str, MethodEntry] = {
    "duallora": MethodEntry(DualLoRAConfig, DualLoRA),
    "frozen": MethodEntry(FrozenConfig, Frozen),
    "linear": MethodEntry(LinearConfig, Linear),
    "lora": MethodEntry(LoRAConfig, LoRA),
}


def method_name(config: MethodConfig) -> str:
    """Name of the method that a configuration belongs to.

    Raises:
        DualLoRAError: if no registered method has that configuration.
    """
    for name, entry in METHODS.items():
        if type(config) is entry.config:
            return name
    raise DualLoRAError(
        f"{type(config).__name__} is no method's configuration; the methods are {', '.join(METHODS)}."
    )


__all__ = [
    "METHODS",
    "Batch",
    "DualLoRA",
    "DualLoRAConfig",
    "Frozen",
    "FrozenConfig",
    "Linear",
    "LinearConfig",
    "LoRA",
    "LoRAConfig",
    "Loader",
    "Method",
    "MethodConfig",
    "MethodEntry",
    "Readout",
    "TaskInfo",
    "method_name",
]
