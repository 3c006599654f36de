"""Versions: a number for half a model, "K.M" for both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import NotFound
from splitserve.versions import UNNAMED, Pair, parse_pair, parse_version, unknown_model

NUMBERS = st.integers(1, 999_999_999)

NO_NUMBERS = [
    "0",
    "01",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1\n",
    "1.0",
    "1e1",
    "v1",
    "latest",
    "1_0",
    "\u0661",
    "\u00b2",
    "1000000000",
    "9" * 5000,
]


@given(NUMBERS)
def test_a_number_is_a_version(number):
    """In the form of the repository."""
    assert parse_version("penguins", str(number)) == number


@given(NUMBERS, NUMBERS)
def test_a_pair_is_two_numbers(preprocessor, predictor):
    """Preprocessor first; parsing and formatting are inverse."""
    pair = parse_pair("penguins", f"{preprocessor}.{predictor}")

    assert pair == Pair(preprocessor, predictor)
    assert str(pair) == f"{preprocessor}.{predictor}"


def test_without_a_version_the_service_chooses():
    """Absent is empty on the wire."""
    assert parse_version("penguins", "") is None
    assert parse_pair("penguins", "") is None


@pytest.mark.parametrize("version", NO_NUMBERS)
def test_a_version_that_is_not_a_number_is_not_found(version):
    """Never ignored, never rounded to one that exists (D14)."""
    with pytest.raises(NotFound) as caught:
        parse_version("penguins", version)

    assert caught.value.message == f"Request for unknown model: 'penguins' is not found, version {version[:32]}"
    assert caught.value.model == "penguins"


@pytest.mark.parametrize(
    "version",
    [
        "1",
        "1.",
        ".1",
        "1.2.3",
        "1,2",
        "0.1",
        "0.0",
        "1.00",
        "01.2",
        " 1.2",
        "1.2 ",
        "1. 2",
        "1.x",
        ".",
        *(f"1.{bad}" for bad in NO_NUMBERS if bad != "0"),
    ],
)
def test_a_version_that_is_not_a_pair_is_not_found(version):
    """The message says how a pair is written."""
    with pytest.raises(NotFound) as caught:
        parse_pair("penguins", version)

    assert caught.value.message == (
        f"Request for unknown model: 'penguins' is not found, version {version[:32]} (a pair is written \"K.M\")"
    )


def test_a_predictor_without_a_number_is_written_as_zero():
    """Third-party servers may have no version numbers; a preprocessor always has one."""
    assert parse_pair("penguins", "2.0") == Pair(2, UNNAMED)


def test_the_newest_pair_is_the_greatest():
    """By preprocessor first, as numbers."""
    pairs = [Pair(2, 1), Pair(1, 10), Pair(1, 9), Pair(10, 1)]

    assert sorted(pairs) == [Pair(1, 9), Pair(1, 10), Pair(2, 1), Pair(10, 1)]


def test_the_message_for_an_unknown_model_is_the_one_that_clients_match():
    """Four programs of tritonclient compare the beginning (D10); an endless name is cut."""
    assert unknown_model("x") == "Request for unknown model: 'x' is not found"
    assert unknown_model("x" * 1000) == f"Request for unknown model: '{'x' * 128}' is not found"


@pytest.mark.parametrize("parse", [parse_version, parse_pair])
def test_a_model_name_is_truncated_to_fit_a_header(parse):
    """It comes from the caller and goes into trailing metadata."""
    with pytest.raises(NotFound) as caught:
        parse("m" * 1000, "x")

    assert caught.value.model == "m" * 128
