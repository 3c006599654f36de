"""The requests of a stage, counted where they are answered: by protocol, model, release and code."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Set

from splitserve.telemetry.families import FAILURES, OK, PROTOCOLS, REQUEST_SECONDS, REQUESTS, UNKNOWN
from splitserve.telemetry.recorders import Exemplar, Histogram
from splitserve.telemetry.registry import Sample

MAX_SERIES = 6500
"""Series of a stage to which failures that have not occurred are filled up: each is about 130 bytes of a scrape."""

SERIES_OF_A_RELEASE = 15
"""Others: those of requests that succeeded, of inferences, rows, calls and queues."""

SLICE = 500
"""Series that are read before other work gets its turn: about half a millisecond."""

_Place = tuple[str, str]
"""Model and release."""
_Key = tuple[str, str, str, str]
"""Protocol, model, release, code."""


class RequestRecorder:
    """Counts requests. Recording one raises nothing: a failure here is only counted.

    Args:
        protocols: that the stage serves.
    """

    def __init__(self, protocols: tuple[str, ...] = PROTOCOLS) -> None:
        self.durations = {protocol: Histogram() for protocol in protocols}
        self.encode = Histogram()
        self.n_failures = 0
        """Requests that could not be counted."""
        self._succeeded: dict[tuple[str, str, str], int] = {}
        """By protocol, model, release."""
        self._failed: dict[_Key, int] = {}
        self._known: Set[_Place] = frozenset()
        self._models: Set[str] = frozenset()
        self._zeros: Mapping[_Key, int] = self._at_zero()

    def use_bounds(self, bounds: tuple[float, ...]) -> None:
        """Upper bounds of the durations; before the first request."""
        self.durations = {protocol: Histogram(bounds) for protocol in self.durations}

    def succeeded(self, protocol: str, model: str, release: str, began: float, encoding_at: float) -> None:
        """Count a request whose answer is encoded.

        Args:
            protocol: that it came by.
            model: an existing one.
            release: that answered.
            began: when it arrived, on the monotonic clock.
            encoding_at: when its answer began to be encoded.
        """
        try:
            now = time.monotonic()
            place = (protocol, model, release)
            self._succeeded[place] = self._succeeded.get(place, 0) + 1
            durations, encode = self.durations[protocol], self.encode
            durations.counts[bisect_left(durations.bounds, now - began)] += 1
            durations.sum += now - began
            encode.counts[bisect_left(encode.bounds, now - encoding_at)] += 1
            encode.sum += now - encoding_at
        except Exception:
            self.n_failures += 1

    def exemplify(self, protocol: str, duration_s: float, trace_id: str, span_id: str) -> None:
        """Name the trace of a request that succeeded, for the bucket of its duration."""
        try:
            durations = self.durations[protocol]
            exemplar = Exemplar(duration_s, time.time(), trace_id, span_id)
            durations.exemplars[bisect_left(durations.bounds, duration_s)] = exemplar
        except Exception:
            self.n_failures += 1

    def failed(self, protocol: str, model: str, release: str, code: str) -> None:
        """Count a request that failed.

        Args:
            protocol: that it came by.
            model: as the caller named it.
            release: that it was bound to, or as the caller named it.
            code: of the table of errors, or CANCELLED.
        """
        try:
            if model not in self._models:
                model, release = UNKNOWN, ""
            elif (model, release) not in self._known:
                release = ""
            place = (protocol, model, release, code)
            self._failed[place] = self._failed.get(place, 0) + 1
        except Exception:
            self.n_failures += 1

    @property
    def models(self) -> Set[str]:
        """Those that are known."""
        return self._models

    def know(self, places: Set[_Place]) -> None:
        """These models and releases exist: others are `unknown` from now on, and their series go."""
        if places == self._known:
            return
        self._known, self._models = places, {model for model, _ in places}
        self._succeeded = {key: n for key, n in self._succeeded.items() if key[1:] in places}
        self._failed = {
            key: n for key, n in self._failed.items() if key[1:3] in places or (not key[2] and key[1] in {UNKNOWN, *self._models})
        }
        self._zeros = self._at_zero()

    def _at_zero(self) -> dict[_Key, int]:
        """What begins at 0: requests of known releases, and failures of these, of known models, and of unknown ones.

        With very many releases only the first codes do, so that a scrape stays small.
        """
        releases = sorted(place for place in self._known if place[1])
        unbound = [(UNKNOWN, ""), *((model, "") for model in sorted(self._models))]
        n_places = len(self.durations) * (len(releases) + len(unbound))
        n_left = max(0, MAX_SERIES - SERIES_OF_A_RELEASE * len(releases))
        codes = FAILURES[: n_left // n_places] if n_places else ()
        found = {(protocol, *place, OK): 0 for place in releases for protocol in self.durations}
        for place in (*releases, *unbound):
            found.update({(protocol, *place, code): 0 for protocol in self.durations for code in codes})
        return found

    def collect(self, stage: str) -> Iterator[Sample | None]:
        """Its samples: the durations, then the counts of that moment."""
        for protocol, durations in self.durations.items():
            yield Sample(REQUEST_SECONDS, (stage, protocol), durations.read())
        counts = {**self._zeros, **self._failed}
        for (protocol, model, release), n in self._succeeded.items():
            counts[protocol, model, release, OK] = n
        for index, ((protocol, model, release, code), n) in enumerate(counts.items()):
            if index % SLICE == SLICE - 1:
                yield None
            yield Sample(REQUESTS, (stage, model, release, protocol, code), n)
