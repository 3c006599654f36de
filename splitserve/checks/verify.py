"""Verifies a running system: sends the golden rows of releases to it and compares the answers with the recorded ones.

Answers of the whole are recorded in each release, so nothing is computed here: numpy is all that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import msgspec

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError, Unavailable
from splitserve.oip.messages import DEFAULT, ModelMetadata
from splitserve.repository import golden as goldens
from splitserve.repository.defaults import default_release
from splitserve.repository.golden import Difference, Golden
from splitserve.repository.manifest import GOLDEN_FILE, BundleError
from splitserve.repository.release import History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import BundleSource
from splitserve.runtimes.release import golden_of
from splitserve.versions import Pair, parse_pair


class ServerUnderTest(Protocol):
    """A client of the system to verify, over any transport."""

    def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
        """Raises:
        SplitserveError: the system rejected the request, or is unreachable.
        """
        ...

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Raises:
        SplitserveError: as `infer`.
        """
        ...


class Outcome(msgspec.Struct, frozen=True):
    """The result for a pair.

    ``sequence`` is the number of its release, 0 if it has none; ``n_rows`` how many golden rows were sent; ``problem`` is "" if
    the answers agree.
    """

    model: str
    pair: str
    sequence: int = 0
    n_rows: int = 0
    problem: str = ""
    worst: Difference | None = None


def verify(source: BundleSource, server: ServerUnderTest, model: str, pair: Pair | None = None) -> list[Outcome]:
    """Compare a system's answers with those that releases of a model have recorded, one outcome for each pair.

    Args:
        source: the model repository.
        server: the system.
        model: its name.
        pair: only this one. By default those that the system says are ready, with the pair that it must serve: that of the route
            and of the current release; what serves by default is compared, too.

    Raises:
        BundleError: the releases or the route cannot be read.
        SplitserveError: the system does not serve the model.
    """
    reader = ReleaseReader(source)
    history = reader.history(model)
    pairs = [pair] if pair else pairs_of(source, server, model, history)
    outcomes = [_verified(source, server, model, each, history.release_of(each)) for each in pairs]
    problems = [*reader.problems.get(model, ()), *(() if pair else _other_default(source, server, model, history))]
    return [*outcomes, *(Outcome(model, "", problem=problem) for problem in problems)]


def _other_default(source: BundleSource, server: ServerUnderTest, model: str, history: History) -> Iterator[str]:
    """How what requests without a version get differs from what the repository says: a rollback may not be followed."""
    found, expected = server.metadata(model).properties.get(DEFAULT, ""), default_release(source, model, history)
    if found and expected is not None and found != str(expected.pair):
        yield (
            f"requests that name no version get {found}, expected {expected.pair}, as release {expected.sequence} or the route "
            "says; splitserve health may say why"
        )


def pairs_of(source: BundleSource, server: ServerUnderTest, model: str, history: History) -> list[Pair]:
    """The pairs of a model to verify, ascending: those that are ready, that of the route and that of the current release.

    Raises:
        BundleError: the route is invalid.
        SplitserveError: the system does not serve the model.
    """
    route, current = source.route(model), history.current()
    ready = [pair for version in server.metadata(model).versions if (pair := parse_pair(model, version))]
    if pairs := sorted({*ready, *(route.named() if route else ()), *([current.pair] if current else ())}):
        return pairs
    raise Unavailable(f'model "{model}" has no release, and no pair that is ready')


def _verified(source: BundleSource, server: ServerUnderTest, model: str, pair: Pair, release: Release | None) -> Outcome:
    """Send the golden rows of a pair's newest release in one request and compare the answer with the recorded one."""
    outcome = Outcome(model, str(pair))
    if release is None:
        return msgspec.structs.replace(
            outcome, problem=f"has no release, so no answer is recorded; splitserve release {model} {pair} records one"
        )
    outcome = msgspec.structs.replace(outcome, sequence=release.sequence)
    try:
        golden = golden_rows(source, release)
        outcome = msgspec.structs.replace(outcome, n_rows=golden.inputs[0].n_rows)
        answer = server.infer(model, {tensor.name: to_array(tensor) for tensor in golden.inputs}, version=str(pair))
    except BundleError as error:
        return msgspec.structs.replace(outcome, problem=str(error))
    except SplitserveError as error:
        return msgspec.structs.replace(outcome, problem=error.message)
    got = [from_array(name, array) for name, array in answer.items()]
    worst = goldens.worst_difference(golden.outputs, got, release.manifest.tolerances)
    return msgspec.structs.replace(outcome, problem=str(worst or ""), worst=worst)


def golden_rows(source: BundleSource, release: Release) -> Golden:
    """The golden samples of a release: raw rows and the answers of the whole.

    Raises:
        BundleError: they cannot be read, or were changed since the release was recorded; the message names the release.
    """
    try:
        record = source.open_release(release.key)
        if record.manifest_sha256 != release.sha256:
            raise BundleError("the record was changed while it was read")
        return golden_of(release.manifest, record.read(GOLDEN_FILE))
    except BundleError as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(release.key)) else f"{release.key}: {text}") from error
