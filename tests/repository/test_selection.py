"""Which versions are held, by settings and routes."""

from __future__ import annotations

import pytest

from splitserve.repository.manifest import BundleError
from splitserve.repository.routes import Route, RoutedPair, decode
from splitserve.repository.selection import Selection, VersionPolicy, parse_models, parse_policies, pinned, wanted
from splitserve.versions import Pair


@pytest.mark.parametrize(
    ("text", "policies"),
    [
        ("all", {"": VersionPolicy()}),
        ("", {"": VersionPolicy()}),
        ("latest:3", {"": VersionPolicy(3)}),
        ("1.1, 2.1", {"": VersionPolicy(0, (Pair(1, 1), Pair(2, 1)))}),
        (
            "latest:2; penguins = all; digits=1.1",
            {"": VersionPolicy(2), "penguins": VersionPolicy(), "digits": VersionPolicy(0, (Pair(1, 1),))},
        ),
    ],
)
def test_policies_are_by_model(text: str, policies: dict[str, VersionPolicy]) -> None:
    """The one without a name is for all others."""
    assert parse_policies(text) == policies


@pytest.mark.parametrize("text", ["latest", "latest:0", "newest", "1", "1.x", "../m=all", "latest:2; =all", "m=;all"])
def test_an_invalid_version_policy_is_named(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match='"'):
        parse_policies(text)


def test_models_are_a_list_or_all() -> None:
    """An empty list is all."""
    assert Selection(parse_models("a, b")).serves("b")
    assert not Selection(parse_models("a, b")).serves("c")
    assert Selection(parse_models("")).serves("anything")
    with pytest.raises(ValueError, match='"a/b" cannot be the name of a model'):
        parse_models("a/b")


@pytest.mark.parametrize(
    ("published", "refused", "pins", "n_latest", "expected"),
    [
        ({1, 2, 3}, set(), set(), None, {1, 2, 3}),
        ({1, 2, 3}, set(), set(), 2, {2, 3}),
        ({1, 2, 3}, {3}, set(), 2, {1, 2}),
        ({1, 2, 3}, {3}, set(), 1, {2}),
        ({1, 2, 3}, set(), {1}, 1, {1, 3}),
        ({1, 2, 3}, {1}, {1}, 1, {1, 3}),
        ({1, 2}, set(), {7}, 0, set()),
        (set(), set(), set(), 2, set()),
    ],
)
def test_refused_versions_do_not_count_for_latest(
    published: set[int], refused: set[int], pins: set[int], n_latest: int | None, expected: set[int]
) -> None:
    """The newest that can be served, and the pinned one if it exists."""
    assert wanted(published, refused, pins, n_latest) == expected


def test_a_route_pins_its_pairs_halves() -> None:
    """Each half its own number."""
    route = decode(b'{"pairs": [{"pair": "1.2", "weight": 90}]}')

    assert route == Route((RoutedPair("1.2", 90),))
    assert pinned("preprocess", VersionPolicy(), route) == {1}
    assert pinned("predict", VersionPolicy(0, (Pair(9, 8),)), route) == {2, 8}
    assert pinned("predict", VersionPolicy(), None) == set()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "route.json: "),
        (b"{}", "missing required field `pairs`"),
        (b'{"pairs": [{"pair": "1"}]}', 'expected a pair as "K.M", got "1"'),
        (b'{"pairs": [{"pair": "1.1", "weight": -1}]}', "weight of 1.1: expected more than 0 and at most 1000000, got -1"),
        (b'{"pairs": [{"pair": "1.1", "weight": 0}]}', "weight of 1.1: expected more than 0"),
        (b'{"pairs": [{"pair": "1.1", "weight": 1e308}]}', "weight of 1.1: expected more than 0"),
        (b'{"pairs": [{"pair": "1.1", "weigth": 2}]}', "unknown field `weigth`"),
        (b'{"pairs": [{"pair": "1.1"}], "shadw": "2.1"}', "unknown field `shadw`"),
        (b'{"pairs": [{"pair": "1.1"}], "shadow": "2.1"}', "shadow 2.1: shadow traffic is not supported yet"),
        (b'{"pairs": [{"pair": "1.1"}, {"pair": "2.1"}]}', "expected exactly one pair, got 2"),
        (b'{"pairs": []}', "expected exactly one pair, got 0"),
        (b'{"pairs": [], "shadow": "x"}', 'expected a pair as "K.M", got "x"'),
        (b"\xff", "route.json: "),
    ],
)
def test_a_broken_route_is_refused(data: bytes, message: str) -> None:
    """With the reason."""
    with pytest.raises(BundleError, match=message):
        decode(data)
