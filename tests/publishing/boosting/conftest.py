"""These tests need the libraries, which the environment of the other tests does not have: `make test-boosting`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("xgboost") and find_spec("lightgbm") and find_spec("catboost") else ["*.py"]


@pytest.fixture(autouse=True)
def _their_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """The libraries warn of each other's changes; the tests are about answers."""
