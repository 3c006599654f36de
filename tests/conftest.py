"""What tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.demo_models import Demos, publish_demos

settings.register_profile("splitserve", deadline=None)  # a busy machine is no bug
settings.load_profile("splitserve")


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Demos:
    """The demo models, trained and published once in each process that runs tests."""
    return publish_demos(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _lines(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """The lines of docs/conformance.md that a test is about go into its record."""
    for mark in request.node.iter_markers("line"):
        for line in mark.args:
            record_property("line", line)
