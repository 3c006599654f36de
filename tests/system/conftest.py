"""Running systems for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.demo_models import Demos
from tests.system.processes import System


@pytest.fixture(scope="session", params=["split", "fused"])
def system(request: pytest.FixtureRequest, demos: Demos) -> Iterator[System]:
    """The demo models, served split and fused."""
    running = System(demos.repository, is_fused=request.param == "fused").wait_until_settled()
    yield running
    running.stop()
