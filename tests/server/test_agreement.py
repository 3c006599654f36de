"""Which candidate is used while replicas differ."""

from __future__ import annotations

import pytest

from splitserve.server.agreement import PATIENCE_S, Agreement
from tests.server.test_store import Clock


@pytest.mark.parametrize(
    ("candidates", "replicas", "chosen"),
    [
        ("12", ["12", "12"], "2"),
        ("12", ["12", "1", "1"], "1"),
        ("12", ["1", "2"], "2"),
        ("12", ["1", "1", "2"], "1"),
        ("12", ["", "1"], "1"),
        ("12", ["", ""], None),
        ("", ["1"], None),
        ("12", [], None),
    ],
)
def test_the_newest_that_all_have_is_used_or_the_one_that_most_have(candidates: str, replicas: list[str], chosen: str) -> None:
    """Among candidates that equally many replicas have, the newest; never one that no replica has."""
    assert Agreement[str]().choose("m", candidates, replicas) == chosen


def test_what_half_of_the_replicas_have_is_used_after_a_while() -> None:
    """A replica that never gets a release does not block it permanently; a single replica that has it does not decide."""
    clock = Clock()
    agreement: Agreement[str] = Agreement(clock=clock)
    half, minority = ["12", "12", "1", "1"], ["12", "1", "1", "1"]

    at_once = agreement.choose("m", "12", half)
    clock.now = PATIENCE_S
    later = agreement.choose("m", "12", half)
    fewer = agreement.choose("m", "12", minority)
    clock.now = 2 * PATIENCE_S - 1
    again = agreement.choose("m", "12", half), agreement.choose("m", "12", half)

    assert (at_once, later, fewer) == ("1", "2", "1")
    assert again == ("1", "1")
