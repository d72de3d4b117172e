"""A hub on this machine, and a small model that has learned two lessons."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import use_tiny_backbone
from hub_standin import TOKEN, Hub, running
from huggingface_hub import constants
from tiny import tiny_backbone

from duallora.bench.synthetic import simulated_learner
from duallora.methods import METHODS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, in the place of the real hub, with a token and an empty cache."""
    with running() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        for name in set(os.environ) & {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The library asks a broken hub again and again, and waits longer each time.
        impatient = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
        yield hub


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    learner = simulated_learner(tiny_backbone(), METHODS["duallora"].config(), tasks=2, classes=2)
    folder = tmp_path_factory.mktemp("saved") / "model"
    learner.save(folder)
    return folder


@pytest.fixture
def shared_model(saved_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a saved model, a copy for each test."""
    use_tiny_backbone(monkeypatch)
    return Path(shutil.copytree(saved_once, tmp_path / "model"))
