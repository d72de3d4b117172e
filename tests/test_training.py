"""What ends a training is said in a sentence with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
from small_tasks import new_learner, three_tasks

from duallora.errors import DualLoRAError

WORDS = "DefaultCPUAllocator: not enough memory: you tried to allocate 123456789 bytes."


@pytest.mark.parametrize("raised", [RuntimeError(WORDS), MemoryError()], ids=["torch", "python"])
def test_too_large_a_batch_names_what_makes_it_smaller(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("duallora.training._gradients", exhausted)
    with pytest.raises(
        DualLoRAError, match=r"a batch of 8 images; lower --method\.batch_size, .*--accumulate"
    ):
        new_learner().learn(three_tasks()[0])


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("duallora.training._gradients", broken)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        new_learner().learn(three_tasks()[0])
