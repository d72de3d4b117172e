"""300 malformed inputs of ``benchmarks/fuzz.py``: none ends in a traceback, hangs or changes a file."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("fuzz", BENCHMARKS / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz", module)
    spec.loader.exec_module(module)
    # Where two test processes and others share the machine, memory and time say little of one input.
    monkeypatch.setattr(module, "SECONDS", 300.0)
    monkeypatch.setattr(module, "WAITING", 1800.0)
    return module


@pytest.mark.filterwarnings("ignore")
def test_malformed_inputs_end_in_answers_or_sentences(fuzz: Any) -> None:
    counts, faults = fuzz.fuzz(300, seed=0)
    assert faults == []
    assert sum(counts.values()) == 300 and len({kind for kind, _ in counts}) == 8
    assert {outcome for _, outcome in counts} == {"answered", "refused"}


def test_a_fault_is_seen(fuzz: Any) -> None:
    """A check that cannot fail finds nothing."""

    def broken() -> str:
        raise ZeroDivisionError

    def endless() -> str:
        while True:
            pass

    assert fuzz.one(broken).startswith("TRACEBACK")
    fuzz.SECONDS = 0.2
    assert fuzz.one(endless) == "HANG"
    fuzz.WAITING = 0.2
    assert fuzz.one(lambda: str(time.sleep(300))) == "HANG"
    assert fuzz.one(lambda: "answered") == "answered"
