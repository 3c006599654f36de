"""The route of a model, ``route.json``: which pairs serve it, each with its share of the requests."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from splitserve.repository.manifest import BundleError
from splitserve.versions import Pair, parse_pair

ROUTE_FILE = "route.json"


class RoutedPair(msgspec.Struct, frozen=True):
    """A pair, ``"K.M"``, and its weight among those of the route."""

    pair: str
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0


class Route(msgspec.Struct, frozen=True):
    """``route.json``. ``shadow`` names a pair that receives a copy of the requests; its answers are discarded."""

    pairs: tuple[RoutedPair, ...]
    shadow: str = ""

    def named(self) -> list[Pair]:
        """All pairs that the route names."""
        names = [entry.pair for entry in self.pairs] + ([self.shadow] if self.shadow else [])
        return [pair for name in names if (pair := parse_pair("", name))]


_decoder = msgspec.json.Decoder(Route)
_PAIR = re.compile(r"[1-9][0-9]{0,8}\.(0|[1-9][0-9]{0,8})")


def decode(data: bytes) -> Route:
    """The route in a file's bytes.

    Raises:
        BundleError: not JSON, a field is of the wrong type, or a name is not a pair.
    """
    try:
        route = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{ROUTE_FILE}: {error}") from None
    for name in (*(entry.pair for entry in route.pairs), *([route.shadow] if route.shadow else [])):
        if not _PAIR.fullmatch(name):
            raise BundleError(f'{ROUTE_FILE}: expected a pair as "K.M", got "{name[:32]}"')
    return route
