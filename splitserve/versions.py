"""Version strings of the protocol: a number for a preprocessor or a predictor, ``"K.M"`` for a pair of them."""

from __future__ import annotations

import re

import msgspec

from splitserve.errors import NotFound

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Valid model names: they become folders, REST paths and metric labels."""

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")

MAX_VERSION = 999_999_999
"""The largest version number, in folders, keys, requests, settings, routes and releases alike."""

UNNAMED = 0
"""The predictor of a pair if a third-party server has no version numbers: its default version."""


class Pair(msgspec.Struct, frozen=True, order=True):
    """Preprocessor version K with predictor version M, ordered by age. M is 0 for `UNNAMED`."""

    preprocessor: int
    predictor: int

    def __str__(self) -> str:
        return f"{self.preprocessor}.{self.predictor}"


def unknown_model(name: str) -> str:
    """The error message for an unknown model. Source: Triton, whose client programs match it."""
    return f"Request for unknown model: '{name[:128]}' is not found"


def is_number(version: str) -> bool:
    """Whether this is a valid version of a preprocessor or a predictor."""
    return _NUMBER.fullmatch(version) is not None


def is_named(version: str, by: str) -> bool:
    """Whether a request with the version ``by`` means this one: "" means any, a predictor's number any pair with it."""
    return by in ("", version) or (is_number(by) and version.partition(".")[2] == by)


def is_predictor(version: str) -> bool:
    """Whether this is a valid predictor in a pair: a number, or `UNNAMED`."""
    return version == str(UNNAMED) or is_number(version)


def parse_version(model: str, version: str) -> int | None:
    """The number in a request's ``version``; None for "": the service chooses.

    Raises:
        NotFound: it is not a number.
    """
    if not version:
        return None
    if is_number(version):
        return int(version)
    raise NotFound(f"{unknown_model(model)}, version {version[:32]}", model=model[:128])


def parse_pair(model: str, version: str) -> Pair | None:
    """The pair in a request's ``version``; None for "": the service chooses.

    Raises:
        NotFound: it is not of the form ``"K.M"``.
    """
    if not version:
        return None
    halves = version.split(".")
    if len(halves) == 2 and is_number(halves[0]) and is_predictor(halves[1]):
        return Pair(int(halves[0]), int(halves[1]))
    raise NotFound(f'{unknown_model(model)}, version {version[:32]} (a pair is written "K.M")', model=model[:128])
