"""Images, and a model that has learned them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import Call, images, taught_once


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return images(tmp_path / "pets", ["cat", "dog"], 12)


@pytest.fixture(scope="session")
def model_of_pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    return taught_once(folder / "model", images(folder / "pets", ["cat", "dog"], 12))


@pytest.fixture
def model(call: Call, pets: Path, model_of_pets: Path, tmp_path: Path) -> Path:
    """A copy of its own of the model that has learned the pets."""
    return Path(shutil.copytree(model_of_pets, tmp_path / "model"))
