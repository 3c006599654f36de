"""Faces for tests of the protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.contracts.faces import Served, served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_system() -> AsyncIterator[Served]:
    async with served() as system:
        yield system


@pytest.fixture
def system(shared_system: Served) -> Served:
    """Faces that the tests of a module share: a test that changes state starts its own system."""
    shared_system.backend.requests.clear()
    return shared_system
