"""What each part of a service counts, as samples of `splitserve.telemetry.families`. Read at each scrape."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from splitserve.batching.batcher import Batcher
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE, ModelState
from splitserve.oip.statistics import Statistics
from splitserve.telemetry import families
from splitserve.telemetry.families import TELEMETRY_FAILURES, families_with
from splitserve.telemetry.process import ProcessMetrics
from splitserve.telemetry.recorders import LATENCY_BOUNDS
from splitserve.telemetry.registry import Registry, Sample, Snapshot
from splitserve.telemetry.requests import RequestRecorder
from splitserve.wire.byte_budget import ByteBudget

REFRESH_INTERVAL_S = 1.0
CACHE_INTERVAL_S = 60.0

_PHASES = {
    "proxy": ("queue", "hop", "encode"),
    "preprocess": ("queue", "compute", "hop", "encode"),
    "predict": ("queue", "compute", "encode"),
}
"""The phases of each stage."""

_STATES = (READY, LOADING, UNAVAILABLE)

_RELEASES_AT_A_TIME = 50
"""Releases whose series are read before other work gets its turn: less than a millisecond."""


class Measured(Protocol):
    """A service, as far as metrics are concerned: see `splitserve.oip.messages.InferenceService`."""

    @property
    def statistics(self) -> Statistics: ...

    async def index(self) -> list[ModelState]: ...

    async def not_ready_reason(self) -> str: ...


class NextStage(Protocol):
    """The client of the next stage: see `splitserve.remote.inference.RemoteInference`."""

    n_streams_opened: int

    @property
    def stage(self) -> str: ...

    @property
    def retries(self) -> Mapping[str, int]: ...

    @property
    def n_replicas(self) -> int: ...

    @property
    def n_channels(self) -> int: ...


class Part(Protocol):
    """Part of a process, with metrics of its own."""

    async def refresh(self) -> None:
        """Learn what can only be waited for: called before each scrape, and once a second."""
        ...

    def collect(self) -> Iterable[Sample | None]:
        """The values of this moment, with pauses as `splitserve.telemetry.registry.Collect` has them."""
        ...


class StageMetrics:
    """The metrics of one stage. Series of models and releases that are no longer in its index go.

    Args:
        stage: its name.
        service: of the stage.
        protocols: by which requests come; () if it has no face of its own.
        batcher: of its requests, if it merges them.
        n_tried: bundles that were tried, by outcome, if it loads any.
        n_refused: those that were refused, by reason.
        budget: of the bytes that its requests hold.
        next_stage: what calls the next stage, if that is another process.
        golden_errors: of releases by model and release, where it replays their golden samples.
    """

    def __init__(
        self,
        stage: str,
        service: Measured,
        *,
        protocols: tuple[str, ...] = ("grpc", "stream"),
        batcher: Batcher | None = None,
        n_tried: Mapping[str, int] | None = None,
        n_refused: Mapping[Any, int] | None = None,
        budget: ByteBudget | None = None,
        next_stage: NextStage | None = None,
        golden_errors: Callable[[], Mapping[tuple[str, str], float]] = dict,
    ) -> None:
        self._stage = stage
        self._service = service
        self._batcher = batcher
        self._n_tried = n_tried
        self._n_refused = n_refused
        self._budget = budget
        self._next_stage = next_stage
        self._golden_errors = golden_errors
        self._states: Sequence[ModelState] = ()
        self._reason = ""
        self._ready_since: dict[tuple[str, str], float] = {}
        self._first_limits: dict[str, float] = {}
        self.requests = RequestRecorder(protocols)

    async def refresh(self) -> None:
        """Ask the service what it has. No requests are sent by that."""
        self._states = await self._service.index()
        await asyncio.sleep(0)  # both look at each release
        self._reason = await self._service.not_ready_reason()
        await asyncio.sleep(0)
        now = time.time()
        self._ready_since = {
            (state.name, state.version): self._ready_since.get((state.name, state.version), now)
            for state in self._states
            if state.state == READY
        }
        self.requests.know({(state.name, state.version) for state in self._states})
        self._first_limits = {model: limit for model, limit in self._first_limits.items() if model in self.requests.models}

    def collect(self) -> Iterator[Sample | None]:
        """The values of this moment, for what was there at the last refresh. Durations are all read in one step."""
        stage = self._stage
        yield Sample(families.READY, (stage,), int(not self._reason))
        yield from self._durations()
        yield from self.requests.collect(stage)
        yield None
        yield from self._releases()
        if self._batcher is not None:
            yield from self._queues(self._batcher)
        for outcome, n in (self._n_tried or {}).items():
            yield Sample(families.LOADED, (stage, outcome), n)
        for reason, n in (self._n_refused or {}).items():
            yield Sample(families.LOAD_REFUSALS, (stage, reason), n)
        yield Sample(TELEMETRY_FAILURES, (f"{stage} requests",), self.requests.n_failures)
        if self._budget is not None:
            yield Sample(families.BYTES_IN_FLIGHT, (stage,), self._budget.used)
            yield Sample(families.BYTES_LIMIT, (stage,), self._budget.max_bytes)
        if self._next_stage is not None:
            yield from self._replicas(self._next_stage)

    def _durations(self) -> Iterator[Sample]:
        durations = self._service.statistics.durations
        phases = {"queue": durations.queue, "compute": durations.compute, "hop": durations.hop, "encode": self.requests.encode}
        for phase in _PHASES[self._stage]:
            if phase != "encode" or self.requests.durations:
                yield Sample(families.PHASE_SECONDS, (self._stage, phase), phases[phase].read())
        yield Sample(families.CALL_ROWS, (self._stage,), durations.call_rows.read())
        yield Sample(families.CALL_REQUESTS, (self._stage,), durations.call_requests.read())

    def _releases(self) -> Iterator[Sample | None]:
        stage, statistics, states = self._stage, self._service.statistics, self._states
        counts = Counter((state.name, state.state) for state in states)
        for model in dict.fromkeys(state.name for state in states):
            for state in _STATES:
                yield Sample(families.RELEASES, (stage, model, state), counts[model, state])
        for (model, version), since in self._ready_since.items():
            yield Sample(families.LOADED_AT, (stage, model, version), since)
        yield None
        golden_errors = self._golden_errors()
        places = dict.fromkeys((state.name, state.version) for state in states if state.version)
        for index, (model, version) in enumerate(places):
            if index % _RELEASES_AT_A_TIME == _RELEASES_AT_A_TIME - 1:
                yield None
            if (error := golden_errors.get((model, version))) is not None:
                yield Sample(families.GOLDEN_ERROR, (stage, model, version), error)
            labels, entry = (stage, model, version), statistics.find(model, version)
            success, queue = entry.inference_stats.success, entry.inference_stats.queue
            yield Sample(families.INFERENCES, (*labels, "succeeded"), success.count)
            yield Sample(families.INFERENCES, (*labels, "failed"), entry.inference_stats.fail.count)
            yield Sample(families.INFERENCE_SECONDS, labels, success.ns / 1e9)
            yield Sample(families.QUEUE_SECONDS, labels, queue.ns / 1e9)
            yield Sample(families.ROWS, labels, entry.inference_count)
            yield Sample(families.CALLS, labels, entry.execution_count)
            if self._batcher is None:
                yield Sample(families.IN_FLIGHT, labels, statistics.n_in_flight[model, version])

    def _queues(self, batcher: Batcher) -> Iterator[Sample | None]:
        """Of each release; one without requests has no queue, and counts as one with an empty queue."""
        queues = batcher.queues
        for index, place in enumerate(dict.fromkeys((state.name, state.version) for state in self._states if state.version)):
            if index % _RELEASES_AT_A_TIME == 0:
                yield None
            labels, queue = (self._stage, *place), queues.get(place)
            yield Sample(families.QUEUED, labels, queue.n_queued if queue else 0)
            yield Sample(families.IN_FLIGHT, labels, len(queue.requests) if queue else 0)
            yield Sample(families.CALLS_IN_FLIGHT, labels, queue.n_in_flight if queue else 0)
            yield Sample(
                families.ADMISSION_LIMIT, labels, queue.admission.limit if queue else self._first_limit(batcher, place[0])
            )
        for reason, n in batcher.n_refused.items():
            yield Sample(families.REFUSED, (self._stage, reason), n)

    def _first_limit(self, batcher: Batcher, model: str) -> float:
        limit = self._first_limits.get(model)
        if limit is None:
            limit = self._first_limits[model] = batcher.first_limit(model)
        return limit

    def _replicas(self, client: NextStage) -> Iterator[Sample]:
        labels = (self._stage, client.stage)
        for kind, n in client.retries.items():
            yield Sample(families.RETRIES, (*labels, kind), n)
        yield Sample(families.REPLICAS, (*labels, "ready"), client.n_replicas)
        yield Sample(families.REPLICAS, (*labels, "not_ready"), client.n_channels - client.n_replicas)
        yield Sample(families.STREAMS_OPENED, labels, client.n_streams_opened)


class CacheMetrics:
    """Bytes in the cache of model files. They are counted in a thread, at most once in `CACHE_INTERVAL_S`.

    Args:
        count: counts them.
        clock: seconds that never go back.
    """

    def __init__(self, count: Callable[[], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._due_at = -math.inf
        self._n_bytes = 0

    async def refresh(self) -> None:
        if self._clock() >= self._due_at:
            self._due_at = self._clock() + CACHE_INTERVAL_S
            self._n_bytes = await asyncio.to_thread(self._count)

    def collect(self) -> Iterator[Sample]:
        yield Sample(families.CACHE_BYTES, (), self._n_bytes)


class Metrics:
    """All metrics of a process.

    Args:
        latency_bounds: of the durations of requests.
    """

    def __init__(self, latency_bounds: tuple[float, ...] = LATENCY_BOUNDS) -> None:
        self._latency_bounds = latency_bounds
        self.registry = Registry(families_with(latency_bounds), TELEMETRY_FAILURES)
        self.process = ProcessMetrics()
        self._refreshes: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self.registry.add("process", self.process.collect)

    def add(self, stage: str, metrics: StageMetrics) -> RequestRecorder:
        """Show a stage too. Returns what its face records requests with."""
        metrics.requests.use_bounds(self._latency_bounds)
        self.add_part(stage, metrics)
        return metrics.requests

    def add_part(self, name: str, part: Part) -> None:
        """Show a part too."""
        self.registry.add(name, part.collect)
        self._refreshes.append((name, part.refresh))

    async def refresh(self) -> None:
        """Ask each stage what it has. A stage that fails is counted as a failure of telemetry."""
        for stage, refresh in self._refreshes:
            try:
                await refresh()
            except Exception:
                self.registry.failed(stage)

    async def keep_refreshed(self) -> None:
        """Learn once a second which models exist, for requests that fail, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_INTERVAL_S)

    async def snapshot(self) -> Snapshot:
        """The values of now."""
        await self.refresh()
        return await self.registry.snapshot()
