"""A running system that answers rows (``--url``), through the Python client.

The client sends a call's rows in requests of about 1 MiB, a few at a time, and retries those that were refused or did not arrive.
While the system still refuses, this waits, longer each time, and reads no further rows; after `PATIENCE_S` without one answer the
run ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import TypeVar

from splitserve.arrays import from_array, to_array
from splitserve.backoff import Backoff
from splitserve.client import Client
from splitserve.client.environment import arguments_from_environment
from splitserve.errors import DeadlineExceeded, Overloaded, SplitserveError, Unavailable
from splitserve.oip.classification import LABELS
from splitserve.oip.ignored_inputs import ignored_inputs
from splitserve.oip.messages import DEFAULT, RELEASE_DIGEST, RELEASE_SEQUENCE, ROW_WISE, ModelMetadata
from splitserve.scoring.errors import ScoringError, ServerGone
from splitserve.scoring.release import Clock, ScoringRelease
from splitserve.signature import is_row_wise
from splitserve.tensors import Tensor
from splitserve.versions import parse_pair

T = TypeVar("T")

PATIENCE_S = 300.0
REQUEST_TIMEOUT_S = 60.0
BACKOFF = Backoff(0.5, 15.0)

WORTH_WAITING = (Unavailable, Overloaded, DeadlineExceeded)


def release_at(url: str, model: str) -> ScoringRelease:
    """The release that a running system serves as ``MODEL[@VERSION]``, by its metadata.

    Raises:
        ServerGone: it does not answer.
        ScoringError: it does not serve that, or not from a release.
    """
    name, _, version = model.partition("@")
    with _client(url) as client:
        found = _metadata(client, url, name, version)
    pair = version or found.properties.get(DEFAULT, "")
    digest, sequence = found.properties.get(RELEASE_DIGEST, ""), found.properties.get(RELEASE_SEQUENCE, "")
    if not (digest and sequence.isdecimal() and parse_pair(name, pair)):
        raise ScoringError(f'{url}: model "{name}": its metadata names no release; expected a system of splitserve')
    return ScoringRelease(
        repository="",
        model=name,
        sequence=int(sequence),
        pair=pair,
        sha256=digest,
        preprocessor="",
        predictor="",
        inputs=found.inputs,
        outputs=found.outputs,
        ignored=tuple(sorted(ignored_inputs(found))),
        labels=found.properties.get(LABELS, ""),
        is_row_wise=found.properties.get(ROW_WISE) != "false" and is_row_wise(found.inputs, found.outputs),
    )


class RemoteScorer:
    """Answers rows by a running system.

    Args:
        url: of the system, as `Client` takes it.
        release: that must serve there.
        client: a client of the caller's own.
        clock: seconds that never go back.
        pause: waits so many seconds.

    Raises:
        ScoringError: another release serves there, or none.
    """

    def __init__(
        self,
        url: str,
        release: ScoringRelease,
        *,
        client: Client | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url, self._release = url, release
        self._client = client or _client(url)
        self._clock, self._pause = clock, pause
        found = self._patient(partial(self._client.metadata, release.model, release.pair))
        if found.properties.get(RELEASE_DIGEST) != release.sha256:
            raise ScoringError(f"{url}: {release.name}: another release serves as {release.pair} since the run began")

    def infer(self, inputs: Sequence[Tensor], clock: Clock) -> Sequence[Tensor]:
        """As `Scorer.infer`.

        Raises:
            SplitserveError: rows are refused.
            ServerGone: nothing was answered for as long as is waited.
        """
        began = time.perf_counter()
        columns = {tensor.name: to_array(tensor) for tensor in inputs}
        chunk_rows = None if self._release.is_row_wise else 0
        answer = self._patient(
            partial(self._client.infer, self._release.model, columns, version=self._release.pair, chunk_rows=chunk_rows)
        )
        clock.add("remote", time.perf_counter() - began)
        return [from_array(spec.name, answer[spec.name]) for spec in self._release.outputs]

    def _patient(self, call: Callable[[], T]) -> T:
        end = self._clock() + PATIENCE_S
        for attempt in count(1):
            try:
                return call()
            except WORTH_WAITING as error:
                if self._clock() + BACKOFF.longest_s(attempt) > end:
                    raise ServerGone(f"{self._url}: no answer for {PATIENCE_S:.0f} s: {error.message}") from error
            self._pause(BACKOFF.pause_s(attempt))
        raise AssertionError("count() does not end")


def _client(url: str) -> Client:
    """Raises:
    ScoringError: the URL or a file with credentials cannot be used.
    """
    try:
        return Client(url, timeout_s=REQUEST_TIMEOUT_S, text=bytes, **arguments_from_environment())
    except (ValueError, OSError) as error:
        raise ScoringError(f"--url {url}: {error}") from error


def _metadata(client: Client, url: str, model: str, version: str) -> ModelMetadata:
    try:
        return client.metadata(model, version)
    except Unavailable as error:
        raise ServerGone(f"{url}: {error.message}") from error
    except SplitserveError as error:
        raise ScoringError(f"{url}: {error.message}") from error
