"""The route of a model, ``route.json``: which release serves requests that name no version.

Until several releases can share a model's requests, a route names exactly one: the way to pin it.
"""

from __future__ import annotations

import math
import re

import msgspec

from splitserve.repository.manifest import BundleError
from splitserve.versions import Pair, parse_pair

ROUTE_FILE = "route.json"
ROUTE_SIGNATURE_FILE = "route.sig"

MAX_WEIGHT = 1e6


class RoutedPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pair, ``"K.M"``, and its weight among those of the route."""

    pair: str
    weight: float = 1.0


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``route.json``. ``shadow`` names a pair that gets a copy of the requests and whose answers are discarded."""

    pairs: tuple[RoutedPair, ...]
    shadow: str = ""

    def named(self) -> list[Pair]:
        """All pairs that the route names."""
        names = [entry.pair for entry in self.pairs] + ([self.shadow] if self.shadow else [])
        return [pair for name in names if (pair := parse_pair("", name))]


class StoredRoute(msgspec.Struct, frozen=True):
    """The bytes of a route and of its signature, both as they were read."""

    data: bytes
    signature: bytes | None = None


_decoder = msgspec.json.Decoder(Route)
_PAIR = re.compile(r"[1-9][0-9]{0,8}\.(0|[1-9][0-9]{0,8})")


def decode(data: bytes) -> Route:
    """The route in a file's bytes.

    Raises:
        BundleError: not JSON, a field is unknown or of the wrong type, a name is not a pair, a weight is out of range, or it
            requires what is not supported: several pairs, or a shadow.
    """
    try:
        route = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{ROUTE_FILE}: {error}") from None
    for name in (*(entry.pair for entry in route.pairs), *([route.shadow] if route.shadow else [])):
        if not _PAIR.fullmatch(name):
            raise BundleError(f'{ROUTE_FILE}: expected a pair as "K.M", got "{name[:32]}"')
    for entry in route.pairs:
        if not (math.isfinite(entry.weight) and 0 < entry.weight <= MAX_WEIGHT):
            raise BundleError(
                f"{ROUTE_FILE}: weight of {entry.pair}: expected more than 0 and at most {MAX_WEIGHT:.0f}, got {entry.weight:g}"
            )
    if len(route.pairs) != 1:
        raise BundleError(f"{ROUTE_FILE}: expected exactly one pair, got {len(route.pairs)}: weights are not followed yet")
    if route.shadow:
        raise BundleError(f"{ROUTE_FILE}: shadow {route.shadow}: shadow traffic is not supported yet")
    return route


def decode_for(model: str, stored: StoredRoute | None) -> Route | None:
    """The route of a model as it was stored.

    Raises:
        BundleError: as `decode`; the message names the model.
    """
    try:
        return None if stored is None else decode(stored.data)
    except BundleError as error:
        raise type(error)(f"{model}: {error}") from error
