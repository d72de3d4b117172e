"""The methods by the name they have on the command line."""

from __future__ import annotations

from typing import NamedTuple

from duallora.errors import DualLoRAError
from duallora.methods.base import Batch, Loader, Method, Readout, TaskInfo
from duallora.methods.c_lora import RoutedLoRA, RoutedLoRAConfig
from duallora.methods.clora import SharedLoRA, SharedLoRAConfig
from duallora.methods.coda_prompt import CodaPrompt, CodaPromptConfig
from duallora.methods.color import CoLoR, CoLoRConfig
from duallora.methods.config import MethodConfig
from duallora.methods.duallora import DualLoRA, DualLoRAConfig
from duallora.methods.dualprompt import DualPrompt, DualPromptConfig
from duallora.methods.frozen import Frozen, FrozenConfig, Linear, LinearConfig
from duallora.methods.inflora import InfLoRA, InfLoRAConfig
from duallora.methods.joint import Joint, JointConfig
from duallora.methods.l2p import L2P, L2PConfig
from duallora.methods.lora import LoRA, LoRAConfig
from duallora.methods.ncm import NCM, NCMConfig
from duallora.methods.o_lora import OLoRA, OLoRAConfig
from duallora.methods.ranpac import RanPAC, RanPACConfig
from duallora.methods.sd_lora import SDLoRA, SDLoRAConfig
from duallora.methods.slca import SLCA, SLCAConfig
from duallora.methods.sldc import SLDC, SLDCConfig
from duallora.methods.sora import SoRA, SoRAConfig


class MethodEntry(NamedTuple):
    """Configuration and class of a method."""

    config: type[MethodConfig]
    method: type[Method]


METHODS: dict[str, MethodEntry] = {
    "duallora": MethodEntry(DualLoRAConfig, DualLoRA),
    "frozen": MethodEntry(FrozenConfig, Frozen),
    "linear": MethodEntry(LinearConfig, Linear),
    "inflora": MethodEntry(InfLoRAConfig, InfLoRA),
    "lora": MethodEntry(LoRAConfig, LoRA),
    "joint": MethodEntry(JointConfig, Joint),
    "c-lora": MethodEntry(RoutedLoRAConfig, RoutedLoRA),
    "sora": MethodEntry(SoRAConfig, SoRA),
    "color": MethodEntry(CoLoRConfig, CoLoR),
    "clora": MethodEntry(SharedLoRAConfig, SharedLoRA),
    "ncm": MethodEntry(NCMConfig, NCM),
    "ranpac": MethodEntry(RanPACConfig, RanPAC),
    "slca": MethodEntry(SLCAConfig, SLCA),
    "sldc": MethodEntry(SLDCConfig, SLDC),
    "o-lora": MethodEntry(OLoRAConfig, OLoRA),
    "sd-lora": MethodEntry(SDLoRAConfig, SDLoRA),
    "coda-prompt": MethodEntry(CodaPromptConfig, CodaPrompt),
    "dualprompt": MethodEntry(DualPromptConfig, DualPrompt),
    "l2p": MethodEntry(L2PConfig, L2P),
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
    "L2P",
    "METHODS",
    "NCM",
    "SLCA",
    "SLDC",
    "Batch",
    "CoLoR",
    "CoLoRConfig",
    "CodaPrompt",
    "CodaPromptConfig",
    "DualLoRA",
    "DualLoRAConfig",
    "DualPrompt",
    "DualPromptConfig",
    "Frozen",
    "FrozenConfig",
    "InfLoRA",
    "InfLoRAConfig",
    "L2PConfig",
    "Linear",
    "LinearConfig",
    "LoRA",
    "LoRAConfig",
    "Loader",
    "Method",
    "MethodConfig",
    "MethodEntry",
    "NCMConfig",
    "OLoRA",
    "OLoRAConfig",
    "RanPAC",
    "RanPACConfig",
    "Readout",
    "RoutedLoRA",
    "RoutedLoRAConfig",
    "SDLoRA",
    "SDLoRAConfig",
    "SLCAConfig",
    "SLDCConfig",
    "SharedLoRA",
    "SharedLoRAConfig",
    "SoRA",
    "SoRAConfig",
    "TaskInfo",
    "method_name",
]
