"""The methods by the name they have on the command line."""

from __future__ import annotations

import importlib
from typing import NamedTuple, get_type_hints

from duallora.errors import DualLoRAError
from duallora.methods.base import Method
from duallora.methods.config import MethodConfig
from duallora.methods.context import MethodContext
from duallora.methods.interface import Batch, BatchOutputs, Encoding, Loader, TaskInfo

# Name -> file and class; the order is that of `duallora methods`.
_REGISTRY = {
    "duallora": "duallora.DualLoRA",
    "c-lora": "c_lora.RoutedLoRA",
    "sora": "sora.SoRA",
    "color": "color.CoLoR",
    "clora": "clora.SharedLoRA",
    "inflora": "inflora.InfLoRA",
    "sd-lora": "sd_lora.SDLoRA",
    "o-lora": "o_lora.OLoRA",
    "cl-lora": "cl_lora.CLLoRA",
    "mos": "mos.MOS",
    "tuna": "tuna.TUNA",
    "l2p": "l2p.L2P",
    "dualprompt": "dualprompt.DualPrompt",
    "coda-prompt": "coda_prompt.CodaPrompt",
    "ranpac": "ranpac.RanPAC",
    "ncm": "ncm.NCM",
    "slca": "slca.SLCA",
    "sldc": "sldc.SLDC",
    "ssiat": "ssiat.SSIAT",
    "rsiat": "rsiat.RSIAT",
    "lr-rgda": "lr_rgda.LRRGDA",
    "duct": "duct.DUCT",
    "lora": "lora.LoRA",
    "linear": "frozen.Linear",
    "frozen": "frozen.Frozen",
    "joint": "joint.Joint",
}


class MethodEntry(NamedTuple):
    """Configuration and class of a method."""

    config: type[MethodConfig]
    method: type[Method]


def entry(place: str) -> MethodEntry:
    """A method by ``"file.Class"`` in this folder; its configuration is the type of its field ``config``."""
    module, name = place.split(".")
    method: type[Method] = getattr(importlib.import_module(f"duallora.methods.{module}"), name)
    return MethodEntry(get_type_hints(method)["config"], method)


METHODS: dict[str, MethodEntry] = {name: entry(place) for name, place in _REGISTRY.items()}


def method_name(config: MethodConfig) -> str:
    """Name of the method that a configuration belongs to.

    Raises:
        DualLoRAError: if no registered method has that configuration.
    """
    for name, found in METHODS.items():
        if type(config) is found.config:
            return name
    raise DualLoRAError(
        f"{type(config).__name__} is no method's configuration; the methods are {', '.join(METHODS)}."
    )


__all__ = [
    "METHODS",
    "Batch",
    "BatchOutputs",
    "Encoding",
    "Loader",
    "Method",
    "MethodConfig",
    "MethodContext",
    "MethodEntry",
    "TaskInfo",
    "entry",
    "method_name",
]
