"""A server around a model that takes as long as a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving_tools import SlowModel
    from starlette.testclient import TestClient

# The extra serve may not be installed: the tests say so, and what it brings is imported with their fixtures.


@pytest.fixture
def model() -> SlowModel:
    from serving_tools import SlowModel

    return SlowModel()


@pytest.fixture
def client(model: SlowModel) -> Iterator[TestClient]:
    from serving_answers import LIMITS
    from serving_tools import Fixed
    from starlette.testclient import TestClient

    from duallora.serving.app import create_app

    app = create_app(Fixed(model), LIMITS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
