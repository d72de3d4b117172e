"""Values that hold for one forward pass, and only in the thread that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class PerPass(Generic[T]):
    """A value that a method sets around a pass and that layers deep inside the backbone read.

    timm's blocks hand nothing on but tokens, so what else a layer needs cannot be an argument. As an
    attribute of the layer it would be seen by passes of other threads and would outlive its own.
    """

    def __init__(self) -> None:
        self._value: ContextVar[T | None] = ContextVar("per_pass", default=None)

    def __deepcopy__(self, _: dict[int, object]) -> PerPass[T]:
        """A copy of a model is in no pass; a context variable cannot be copied."""
        return PerPass()

    def get(self) -> T | None:
        """The value of the pass that runs in this thread; None outside of one."""
        return self._value.get()

    @contextmanager
    def holding(self, value: T) -> Iterator[T]:
        """Inside, :meth:`get` gives ``value`` in this thread."""
        token = self._value.set(value)
        try:
            yield value
        finally:
            self._value.reset(token)
