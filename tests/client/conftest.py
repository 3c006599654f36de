"""Ways to call, as fixtures."""

from __future__ import annotations

import pytest

from tests.client.ways import WAYS, Way, way_name


@pytest.fixture(params=WAYS, ids=way_name)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture(params=[way for way in WAYS if way.is_rest], ids=way_name)
def rest(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture(params=[way for way in WAYS if not way.is_rest], ids=way_name)
def grpc_way(request: pytest.FixtureRequest) -> Way:
    return request.param
