"""Which release requests that name no version get, from the route and the releases of a model, as commands say it."""

from __future__ import annotations

from splitserve.repository.manifest import BundleError
from splitserve.repository.release import History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.routes import ROUTE_FILE
from splitserve.repository.source import BundleSource


def default_release(source: BundleSource, model: str, history: History) -> Release | None:
    """The release of the route's pair, else the current one; None if there is none.

    Raises:
        BundleError: the route is invalid.
    """
    route = source.route(model)
    return history.current() if route is None else history.release_of(route.named()[0])


def said_of_route(source: BundleSource, model: str, history: History) -> str:
    """What a route changes about the default; "" if the current release is the default."""
    try:
        route = source.route(model)
    except BundleError as error:
        return f"{error}; services follow the last good route, and those that have none ask requests for a version"
    current = history.current()
    if route is None or (current is not None and current.pair in route.named()):
        return ""
    pair = route.named()[0]
    if history.release_of(pair) is None:
        return (
            f"{model}: {ROUTE_FILE} pins {pair}, which has no release, so it is not followed; "
            f'"splitserve release {model} {pair}" makes one'
        )
    instead = f", not release {current.sequence} ({current.pair})" if current else ""
    return f"{model}: {ROUTE_FILE} pins {pair}: requests that name no version get it{instead}"


def said_of_record(source: BundleSource, added: Release) -> list[str]:
    """What serves after a record was added, where that may surprise; nothing if the repository cannot be read now."""
    model = added.key.model
    try:
        list(source.bundles())
        history = ReleaseReader(source).history(model)
        is_unsigned = _is_unsigned(source, added, history)
    except BundleError:
        return []
    withdrawn = next((each for each in history.records if each.sequence == added.manifest.withdraws), None)
    said = [*(_said_of_withdrawal(withdrawn, history) if withdrawn else ()), said_of_route(source, model, history)]
    if is_unsigned:
        said.append(
            f"{added.key} is not signed: services with MODEL_SIGNATURE_KEY do not follow it until splitserve sign has signed it"
        )
    return [each for each in said if each]


def _said_of_withdrawal(withdrawn: Release, history: History) -> list[str]:
    model, said = withdrawn.key.model, []
    if again := history.release_of(withdrawn.pair):
        said.append(
            f"{model}: {withdrawn.pair} still serves, since release {again.sequence} names it too; "
            f'"splitserve release --withdraw {model} {again.sequence}" withdraws that as well'
        )
    current = history.current()
    if current is None:
        said.append(f"{model}: no release is left, so it does not serve any more")
    elif withdrawn.sequence > current.sequence:
        away = next((each.sequence for each in history.records if each.manifest.rolls_back == current.sequence), 0)
        warning = f", which release {away} had rolled back" if away else ""
        said.append(f"{model}: the current release is now {current.sequence} ({current.pair}){warning}")
    return said


def _is_unsigned(source: BundleSource, added: Release, history: History) -> bool:
    """Whether a record has no signature and one before it has."""

    def is_signed(record: Release) -> bool:
        return source.open_release(record.key).signature() is not None

    earlier = [each for each in reversed(history.records) if each.sequence < added.sequence]
    return any(map(is_signed, earlier)) and not is_signed(added)
