"""A hub on this machine, and a small model that has learned two lessons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
        yield hub


@pytest.fixture
def shared_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a saved model."""
    use_tiny_backbone(monkeypatch)
    learner = simulated_learner(tiny_backbone(), METHODS["duallora"].config(), tasks=2, classes=2)
    learner.save(tmp_path / "model")
    return tmp_path / "model"
