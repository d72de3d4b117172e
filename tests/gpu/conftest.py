"""Tests on a GPU, skipped without one; ``DUALLORA_GPU_TESTS=cpu`` tries out the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("DUALLORA_GPU_TESTS", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def device() -> str:
    """Where the tests compute."""
    return DEVICE


@pytest.fixture
def cuda(device: str) -> str:
    """The same for what no other device has."""
    if device != "cuda":
        pytest.skip("only a CUDA device has this")
    return device
