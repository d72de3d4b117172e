"""Images, and a model that has learned them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Call, images


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return images(tmp_path / "pets", ["cat", "dog"], 12)


@pytest.fixture
def model(call: Call, pets: Path, tmp_path: Path) -> Path:
    assert call("learn", tmp_path / "model", pets, "--epochs", 1).code == 0
    return tmp_path / "model"
