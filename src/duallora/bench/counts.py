"""Counts that do not depend on how fast a machine is: operations, passes and bytes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from duallora.backbones.backbone import Backbone


def _product(_: object, h: Sequence[int], c: Sequence[int], **__: object) -> int:
    """Of ``h c`` with shapes ([B,] n, K) and ([B,] K, out)."""
    return 2 * prod(h) * c[-1]


_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}
"""Products that torch's counter knows only where they make a new tensor."""


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the products, convolutions and attentions in a call."""
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        call()
    return int(counter.get_total_flops())


class ImagesSeen:
    """How many images have entered a backbone."""

    def __init__(self) -> None:
        self.images = 0


@contextmanager
def images_seen(backbone: Backbone) -> Iterator[ImagesSeen]:
    """Counts the images that enter the backbone inside the context, each as often as it does."""
    seen = ImagesSeen()

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.images += len(args[0])

    handle = backbone.model.get_submodule("patch_embed").register_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def state_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a saved state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def held_bytes(*owners: object, device: torch.device) -> int:
    """Bytes of all tensors on a device that can be reached from the owners; shared memory counts once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = list(owners)
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.device.type == device.type:
                storage = each.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            waiting.append(each.grad)
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += each
        elif dataclasses.is_dataclass(each) or type(each).__module__.startswith(
            ("duallora", "timm", "torch.nn", "torch.optim")
        ):
            waiting += getattr(each, "__dict__", {}).values()
    return sum(sizes.values())


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing reaches stderr: the profiler's C++ remarks there have no switch."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that a call has allocated at once, above what was there before it.

    On a GPU from the allocator's own peak. On the CPU from torch's record of allocations: the resident memory
    of a process does not say it, for it grows with what other candidates have freed but not given back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events: Any = record.profiler
    changes = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak
