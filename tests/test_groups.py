"""How tests are shared out to workers."""

from __future__ import annotations

import os

import pytest


@pytest.mark.heavy  # as what is grouped: unit tests are handed out singly
@pytest.mark.xdist_group("named")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process")
def test_tests_of_a_group_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """Otherwise each worker would start the shared systems, unnoticed: the xdist group is part of the test's id."""
    assert request.node.nodeid.endswith("@named")
