"""The catalogue of a service's models, and which version a request gets."""

from __future__ import annotations

import pytest

from splitserve.catalogue import Catalogue, Entry, why_not_ready
from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE, ModelState
from splitserve.versions import Pair


def ready(value: str) -> Entry[str]:
    return Entry(READY, value=value)


BROKEN: Entry[str] = Entry(UNAVAILABLE, "golden samples differ")
LOST = Entry(UNAVAILABLE, "predict cannot be reached", "still known")
"""Not ready at the last look, and yet worth a try."""


def catalogue(**entries: dict[int, Entry[str]]) -> Catalogue[int, str]:
    found: Catalogue[int, str] = Catalogue()
    for model, versions in entries.items():
        for version, entry in versions.items():
            found.put(model, version, entry)
    return found


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({1: ready("a")}, (1, "a")),
        ({2: ready("b"), 1: ready("a")}, (2, "b")),
        ({9: ready("a"), 10: ready("b")}, (10, "b")),
        ({1: ready("a"), 2: BROKEN}, (1, "a")),
        ({1: ready("a"), 2: LOST}, (1, "a")),
        ({1: LOST, 2: BROKEN}, (1, "still known")),
        ({1: ready("a"), 2: Entry(LOADING)}, (1, "a")),
        ({1: LOST, 2: LOST}, (2, "still known")),
    ],
)
def test_the_newest_ready_version_is_chosen(versions, chosen):
    """Or, if none is ready, the newest that can be tried; a bad version never takes a good one down."""
    assert catalogue(penguins=versions).choose("penguins", None) == chosen


def test_a_requested_version_serves():
    """Whether or not it was ready at the last poll."""
    known = catalogue(penguins={1: ready("a"), 2: LOST, 3: ready("c")})

    assert known.choose("penguins", 1) == (1, "a")
    assert known.choose("penguins", 2) == (2, "still known")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (BROKEN, 'model "penguins" version 2 is not ready: golden samples differ'),
        (Entry(LOADING), 'model "penguins" version 2 is not ready: loading'),
    ],
)
@pytest.mark.parametrize("version", [2, None])
def test_the_error_for_a_version_that_cannot_serve_has_the_reason(entry, message, version):
    """Requested, or the only one."""
    versions = {2: entry} if version is None else {1: ready("a"), 2: entry}

    with pytest.raises(Unavailable) as caught:
        catalogue(penguins=versions).choose("penguins", version)

    assert caught.value.message == message
    assert (caught.value.model, caught.value.pair) == ("penguins", "2")


@pytest.mark.parametrize("version", [1, None])
def test_an_unknown_model_is_not_found(version):
    """With the text that clients match; a long name is cut."""
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'other' is not found$"):
        catalogue(penguins={1: ready("a")}).choose("other", version)

    with pytest.raises(NotFound) as caught:
        catalogue().choose("m" * 1000, version)
    assert caught.value.model == "m" * 128


def test_an_unknown_version_is_not_found():
    """Another one is never served in its place (D14); the message lists the known ones, the newest first."""
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'penguins' is not found, version 2; its versions: 3, 1$"):
        catalogue(penguins={1: ready("a"), 3: ready("c")}).choose("penguins", 2)


def test_only_some_of_many_versions_are_listed():
    """An error stays readable."""
    known = catalogue(penguins={number: ready("a") for number in range(1, 100)})

    message = known.not_found("penguins", "v" * 1000).message

    assert message.endswith(f"version {'v' * 32}; its versions: {', '.join(map(str, range(99, 79, -1)))}")


@pytest.mark.parametrize("version", [1, None])
def test_an_incomplete_model_is_unavailable(version):
    """It is known, but one half is missing."""
    known = catalogue()
    known.put_incomplete("penguins", "it has a preprocessor but no predictor")

    with pytest.raises(Unavailable) as caught:
        known.choose("penguins", version)

    assert caught.value.message == 'model "penguins" cannot be served: it has a preprocessor but no predictor'
    assert caught.value.model == "penguins"


def test_a_new_entry_replaces_the_earlier_one():
    """Loading becomes ready."""
    known = catalogue(penguins={1: Entry(LOADING)})

    known.put("penguins", 1, ready("a"))

    assert known.entries("penguins") == {1: ready("a")}
    assert ("penguins", 1) in known
    assert ("penguins", 2) not in known
    assert ("other", 1) not in known


def test_models_and_versions_are_sorted():
    """Names alphabetically, versions numerically, in any order of insertion; incomplete models included."""
    known = catalogue(zebras={1: ready("a")}, penguins={10: ready("b"), 9: ready("a"), 11: BROKEN, 2: LOST})
    known.put_incomplete("digits", "no predictor")

    assert known.models() == ["digits", "penguins", "zebras"]
    assert list(known.entries("penguins")) == [2, 9, 10, 11]
    assert known.ready_versions("penguins") == (9, 10)
    assert known.entries("other") == {}
    assert known.ready_versions("other") == ()


def test_the_index_lists_every_version():
    """Ready or not, with the reason; an incomplete model has no version."""
    known: Catalogue[Pair, str] = Catalogue()
    known.put("penguins", Pair(1, 2), BROKEN)
    known.put("penguins", Pair(1, 1), ready("a"))
    known.put_incomplete("digits", "no predictor")

    assert known.index() == [
        ModelState("penguins", "1.1", READY),
        ModelState("penguins", "1.2", UNAVAILABLE, "golden samples differ"),
        ModelState("digits", "", UNAVAILABLE, "no predictor"),
    ]


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ([], "no models found"),
        ([ModelState("a", "1", UNAVAILABLE, "broken"), ModelState("b", "1", READY)], ""),
        ([ModelState("a", "1", READY), ModelState("b", "1", LOADING)], ""),
        ([ModelState("a", "1", LOADING)], "no model is ready: a 1: loading"),
        ([ModelState("a", "", UNAVAILABLE, "no predictor")], "no model is ready: a: no predictor"),
        (
            [ModelState("a", "1", UNAVAILABLE, "lost"), ModelState("b", "1", LOADING), ModelState("a", "2", UNAVAILABLE, "lost")],
            "no model is ready: a 1, a 2: lost; b 1: loading",
        ),
        (
            [ModelState("a", str(number), UNAVAILABLE, "lost") for number in range(5)],
            "no model is ready: a 0, a 1, a 2, a 3, a 4: lost",
        ),
        (
            [ModelState("a", str(number), UNAVAILABLE, "lost") for number in range(9)],
            "no model is ready: a 0, a 1, a 2, a 3, a 4 and others: lost",
        ),
        (
            [ModelState("a", str(number), UNAVAILABLE, f"why {number}") for number in range(9)],
            "no model is ready: a 0: why 0; a 1: why 1; a 2: why 2; a 3: why 3; a 4: why 4",
        ),
    ],
)
def test_the_reason_for_not_ready_is_given(states, reason):
    """One ready version is sufficient; otherwise the reasons are grouped, and only some of many are listed."""
    assert why_not_ready(states) == reason
