"""A running server."""

from __future__ import annotations

import pytest
from http_server import serving

CAPACITY = 8


@pytest.fixture(scope="module")
def server(slow_artifact):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    with serving(slow_artifact, "--capacity", str(CAPACITY)) as server:
        yield server
