"""The lines of docs/conformance.md that a test is about go into its record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tests.contracts.faces import Served, served


@pytest.fixture(autouse=True)
def _lines(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    for mark in request.node.iter_markers("line"):
        for line in mark.args:
            record_property("line", line)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_system() -> AsyncIterator[Served]:
    async with served() as system:
        yield system


@pytest.fixture
def system(shared_system: Served) -> Served:
    """Faces that the tests of a module share: what a test changes has to be a system of its own."""
    shared_system.backend.requests.clear()
    return shared_system
