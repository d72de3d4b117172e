"""Where and how a model computes: device, processes, precision, data loading; Lightning Fabric underneath.

The commands' options are here, and ``--help`` must not wait for torch: it is imported where it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision import Precision

Device = Literal["auto", "cpu", "cuda", "mps"]
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute; what a result is, these leave alone up to rounding.

    Attributes:
        device: where to compute
        devices: processes a machine, one a GPU (or on the CPU); a batch is divided among them. Under torchrun
            they come from there
        num_nodes: machines that train together; each starts this command
        strategy: ddp starts the processes; auto is ddp for several
        precision: auto is bf16-mixed where the device computes in it, else 32
        accumulate: pieces that a batch is computed in, one after another; for batches that do not fit
        compile: compile the backbone with torch.compile
        workers: processes that prepare images, where that is worth it; where it is not given, one a core, at
            most 16
        image_memory: share of the memory of the machine, or of its container or job, for prepared images,
            which are decoded once
    """

    device: Device = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    accumulate: int = 1
    compile: bool = False
    workers: int | None = None
    image_memory: float = 0.25

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing.

        Raises:
            DualLoRAError: naming the option.
        """
        for name in ("devices", "num_nodes", "accumulate"):
            if getattr(self, name) < 1:
                raise DualLoRAError(
                    f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}."
                )
        if self.workers is not None and self.workers < 0:
            raise DualLoRAError(f"--workers must be at least 0, not {self.workers}.")
        if not 0 <= self.image_memory <= 1:
            raise DualLoRAError(f"--image-memory must lie in [0, 1], not {self.image_memory}.")

    def check(self) -> tuple[str, str, int, int]:
        """What there is of it on this machine: device, precision, processes a machine, machines.

        Raises:
            DualLoRAError: a device, a number of them or a precision that is not there.
        """
        import torch

        device = _resolve(self.device)
        devices, nodes = _processes(self.devices, self.num_nodes)
        if device == "cuda" and devices > torch.cuda.device_count():
            raise DualLoRAError(
                f"--devices {devices} were asked for and this machine has {torch.cuda.device_count()}."
            )
        if device == "mps" and devices * nodes > 1:
            raise DualLoRAError("several processes cannot share an mps device; leave --devices out.")
        return device, _precision(self.precision, device), devices, nodes

    def start(self) -> Machine:
        """Starts the processes, or joins those that torchrun or Slurm have started.

        Raises:
            DualLoRAError: as for `check`.
        """
        device, precision, devices, nodes = self.check()
        machine = Machine(self, device, precision, devices, nodes)
        if devices * nodes > 1:
            machine.fabric.launch()
        return machine


@dataclass(frozen=True)
class Machine:
    """A device that is there, with its processes running.

    Attributes:
        compute: what was asked for.
        kind: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        precision: ``"32"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        devices: processes on each machine.
        nodes: machines.
    """

    compute: Compute
    kind: str
    precision: str
    devices: int = 1
    nodes: int = 1

    @classmethod
    def of(cls, device: str | Machine) -> Machine:
        """The machine itself, or this process on a device by its name.

        Raises:
            DualLoRAError: if the device is not there.
        """
        return device if isinstance(device, Machine) else Compute(device).start()  # type: ignore[arg-type]

    @cached_property
    def fabric(self) -> Fabric:
        """What trains; loading a model and predicting do without, as importing it takes over a second."""
        from lightning_fabric import Fabric

        several = self.devices * self.nodes > 1
        return Fabric(
            accelerator=self.kind,
            devices=self.devices,
            num_nodes=self.nodes,
            strategy="ddp" if several or self.compute.strategy == "ddp" else "auto",
            plugins=_plugin(self.precision, self.kind),
        )

    @cached_property
    def device(self) -> torch.device:
        """Of this process."""
        import torch

        if self.devices * self.nodes > 1:
            return self.fabric.device
        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, 0)

    def autocast(self, compiled: bool = False) -> AbstractContextManager[None]:
        """Inside, the backbone computes in ``precision``; what is ``compiled`` keeps its attention."""
        if self.kind == "cpu" and self.precision == "bf16-mixed" and not compiled:
            return _step_by_step(self.fabric.autocast())
        return self.fabric.autocast()

    @property
    def workers(self) -> int:
        """Most processes that prepare images for this one."""
        if self.compute.workers is not None:
            return self.compute.workers
        return min(16, (os.cpu_count() or 1) // self._neighbours)

    @property
    def image_bytes(self) -> int:
        """Memory for prepared images of this process."""
        if not hasattr(os, "sysconf"):  # Windows does not say
            return 2**30
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(min([memory, *_cgroup_limits()]) * self.compute.image_memory) // self._neighbours

    @property
    def _neighbours(self) -> int:
        """Processes on this machine."""
        from duallora.runtime import parallel

        return max(1, parallel.size() // self.nodes)


@contextmanager
def _step_by_step(autocast: AbstractContextManager[None]) -> Iterator[None]:
    """A precision with the attention that is faster in it."""
    from duallora.runtime.attention import StepByStep

    with autocast, StepByStep():
        yield


def _cgroup_limits() -> list[int]:
    """Bytes that the cgroups (version 2) of this process allow: those of a container or of a Slurm job."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    own = next((group.removeprefix("0::/") for group in groups if group.startswith("0::/")), "")
    limits = []
    for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
        file = folder / "memory.max"
        text = file.read_text().strip() if file.exists() else "max"
        limits += [int(text)] if text.isdecimal() else []
    return limits


def _resolve(device: str) -> str:
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device, False):
        usable = ", ".join(name for name, found in there.items() if found)
        raise DualLoRAError(f"device {device!r} is not available on this machine; take auto, {usable}.")
    return device


def _processes(devices: int, nodes: int) -> tuple[int, int]:
    """Processes a machine and machines: torchrun's, which has started them already, else what was asked."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, nodes
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])


def _precision(precision: str, device: str) -> str:
    if precision == "16-mixed" and device != "cuda":
        raise DualLoRAError("--precision 16-mixed needs a CUDA device; take bf16-mixed or 32.")
    if precision == "auto":
        return "bf16-mixed" if _computes_in_bf16(device) else "32"
    return precision


def _plugin(precision: str, device: str) -> Precision:
    """As a plugin, because precision="bf16-mixed" makes Fabric announce it on stderr at every start."""
    from lightning_fabric.plugins.precision import MixedPrecision, Precision

    return Precision() if precision == "32" else MixedPrecision(precision, device)  # type: ignore[arg-type]


def _computes_in_bf16(device: str) -> bool:
    """Whether the device has instructions for bf16 products; where it would emulate them, fp32 is faster."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Any = (
        torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    )
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
