"""What tests share."""

from __future__ import annotations

import pytest

from tests.demo_models import Demos, publish_demos


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Demos:
    """The demo models, trained and published once in each process that runs tests."""
    return publish_demos(tmp_path_factory.mktemp("models"))
