"""A saved model."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_generations import save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with two generations, the second one current."""
    folder = tmp_path / "model"
    save(folder, 1)
    save(folder, 2)
    return folder
