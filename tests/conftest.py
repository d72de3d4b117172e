from __future__ import annotations

import gc
import signal

# Millions of objects are imported and collected, hardly one is garbage: looking for it takes half the time.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402
from command_line import Call, caller, use_tiny_backbone  # noqa: E402

# Sums are then added up in the same order on every machine, and processes can be forked safely.
torch.set_num_threads(1)

# A shell ignores Ctrl-C for what it starts in the background, nohup the end of the terminal, and processes
# inherit that; those of the tests have to notice both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes or learn for seconds come first: no worker is left with one at the end."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("process", "browser", "slow")))}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is there now stays until the end; only what tests make is looked through for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs commands on a tiny backbone."""
    use_tiny_backbone(monkeypatch)
    return caller(capsys)
