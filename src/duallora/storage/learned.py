"""Modules that hold what was learned: their tensors take the shape of what is loaded.

Rows, heads and factors grow with the tasks, so that a new model has other shapes than a saved one, and some
tensors are there for some models only. ``state_dict`` and ``load_state_dict`` of torch do all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


class Learned(nn.Module):
    """A module whose buffers are what it has learned.

    Subclasses register their buffers as ever. One that is None is not there, and is not saved. What follows
    from the buffers is computed in :meth:`refresh`.

    Args:
        device: of loaded tensors whose buffer is not there yet; the others stay where their buffer is.

    Attributes:
        optional: buffers that a saved model may lack.
    """

    optional: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__()
        self.device = device
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Computes what follows from the buffers; called after they have been loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Makes room for what is loaded; torch copies it there, or says what is missing.

        Raises:
            RuntimeError: a tensor has more or fewer dimensions than the buffer that it is for.
        """
        for name, old in self._buffers.items():
            found = state_dict.get(prefix + name)
            if found is not None:
                if old is not None and found.ndim != old.ndim:
                    raise RuntimeError(f"{prefix}{name} has {found.ndim} dimensions, not {old.ndim}")
                device = self.device if old is None else old.device
                self._buffers[name] = torch.empty_like(found, device=device)
            elif name in self.optional:
                self._buffers[name] = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts as torch does, but for statistics: what is fp64 or counts stays as it is.

        A sum in fp32 is another sum, and not every device has fp64.
        """
        kept = {n: x for n, x in self._buffers.items() if x is not None and x.dtype in _EXACT}
        self._buffers.update(dict.fromkeys(kept))  # torch passes over what is None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(kept)
        return self


_EXACT = (torch.float64, torch.long)


def _refresh(module: Learned, _: Any) -> None:
    module.refresh()


class ByTask(Learned):
    """One tensor a task, as a mapping from the tasks' indices in rising order; tasks may lack one."""

    def __getitem__(self, task: int) -> Tensor:
        found = self._buffers[str(task)]
        if found is None:
            raise KeyError(task)
        return found

    def __setitem__(self, task: int, tensor: Tensor) -> None:
        self.register_buffer(str(task), tensor)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(map(int, self._buffers)))

    def __len__(self) -> int:
        return len(self._buffers)

    def items(self) -> list[tuple[int, Tensor]]:
        """Tasks and their tensors."""
        return [(task, self[task]) for task in self]

    def discard(self, task: int) -> None:
        """Loses the tensor of a task, if there is one."""
        self._buffers.pop(str(task), None)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self._buffers.clear()
        for name in _numbers(state_dict, prefix):
            self.register_buffer(name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Tensors(Learned):
    """Some tensors under names.

    Args:
        tensors: name to tensor; None makes room for one that is loaded.
        device: as for :class:`Learned`.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None], device: torch.device = CPU) -> None:
        super().__init__(device)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Groups(Learned):
    """Groups of tensors with the same names, each under a number.

    Args:
        names: of the tensors in each group.
        device: as for :class:`Learned`.
    """

    def __init__(self, *names: str, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.names = names

    def put(self, number: int, *tensors: Tensor) -> None:
        """Sets the group of a number; the tensors in the order of the names."""
        self.add_module(str(number), Tensors(dict(zip(self.names, tensors, strict=True)), self.device))

    def __contains__(self, number: int) -> bool:
        return str(number) in self._modules

    def __getitem__(self, number: int) -> list[Tensor]:
        """The tensors of a number, in the order of the names."""
        group = self._modules[str(number)]
        return [getattr(group, name) for name in self.names]

    def groups(self) -> list[tuple[int, list[Tensor]]]:
        """Numbers in rising order with the tensors of each."""
        return [(number, self[number]) for number in sorted(map(int, self._modules))]

    def discard(self, number: int) -> None:
        """Loses the group of a number, if there is one."""
        self._modules.pop(str(number), None)

    def clear(self) -> None:
        """Loses all groups."""
        self._modules.clear()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.clear()
        for number in _numbers(state_dict, prefix):
            self.add_module(number, Tensors(dict.fromkeys(self.names), self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class SideBySide(nn.Module):
    """Two modules whose tensors are saved under one name, beside one another.

    Args:
        first: as it is.
        second: has other names than the first.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_state_dict_post_hook(_joined)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_divided)  # type: ignore[no-untyped-call]


def _joined(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        part, _dot, rest = name[len(prefix) :].partition(".")
        if part in ("first", "second"):
            state[prefix + rest] = state.pop(name)


def _divided(module: SideBySide, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    second = module.second
    own = {*second._buffers, *second._parameters, *second._modules}
    for name in [name for name in state if name.startswith(prefix)]:
        rest = name[len(prefix) :]
        state[f"{prefix}{'second' if rest.split('.')[0] in own else 'first'}.{rest}"] = state.pop(name)


def _numbers(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The numbers that follow a prefix in the names of a state, in rising order."""
    first = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    return sorted((number for number in first if number.isdecimal()), key=int)
