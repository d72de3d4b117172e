"""A command on a tiny backbone."""

from __future__ import annotations

import pytest
from command_line import Call, caller, use_tiny_backbone


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    use_tiny_backbone(monkeypatch)
    return caller(capsys)
