"""Counts and durations of inferences since the process began. Source: Triton's "statistics" extension.

Each service counts its own work. ``compute_input``, ``compute_infer`` and ``compute_output`` are

- at predict, of a run: creating arrays, running the model, creating tensors; of a request: checking it, those three, nothing;
- at preprocess: transforming, calling predict, the postprocess step;
- at the proxy: checking the request, calling preprocess, nothing.

``queue`` is the time in a queue, or waiting for a thread.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal

import msgspec

from splitserve.errors import NotFound
from splitserve.oip.messages import READY, ModelState
from splitserve.telemetry.recorders import SIZE_BOUNDS, Histogram
from splitserve.versions import is_named, unknown_model

N_BATCH_SIZES = 128
"""Batch sizes that are counted separately; further ones are counted in the totals only."""

Part = Literal["queue", "input", "infer", "output"]


class Duration(msgspec.Struct):
    """How often something was done, and the total nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.ns += ns


class InferStatistics(msgspec.Struct):
    """Per request. ``success`` and ``fail`` are whole requests; the others are parts of the successful ones."""

    success: Duration = msgspec.field(default_factory=Duration)
    fail: Duration = msgspec.field(default_factory=Duration)
    queue: Duration = msgspec.field(default_factory=Duration)
    compute_input: Duration = msgspec.field(default_factory=Duration)
    compute_infer: Duration = msgspec.field(default_factory=Duration)
    compute_output: Duration = msgspec.field(default_factory=Duration)
    cache_hit: Duration = msgspec.field(default_factory=Duration)
    cache_miss: Duration = msgspec.field(default_factory=Duration)


class BatchStatistics(msgspec.Struct):
    """Runs of ``batch_size`` rows."""

    batch_size: int
    compute_input: Duration = msgspec.field(default_factory=Duration)
    compute_infer: Duration = msgspec.field(default_factory=Duration)
    compute_output: Duration = msgspec.field(default_factory=Duration)


class ModelStatistics(msgspec.Struct):
    """One version of a model, with the fields of the extension.

    ``last_inference`` is in milliseconds since the epoch, 0 for none. ``inference_count`` counts rows, ``execution_count`` runs,
    each of one or several requests.
    """

    name: str
    version: str
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferStatistics = msgspec.field(default_factory=InferStatistics)
    batch_stats: list[BatchStatistics] = []

    def succeeded(self, n_requests: int, *, n_rows: int, total_ns: int, parts: Mapping[Part, int]) -> None:
        """Count successful requests.

        Args:
            n_requests: of one call.
            n_rows: of all of them.
            total_ns: sum of their durations.
            parts: sums of the parts of their durations.
        """
        self.last_inference = time.time_ns() // 1_000_000
        self.inference_count += n_rows
        stats = self.inference_stats
        success = stats.success
        success.count += n_requests
        success.ns += total_ns
        stats.queue.ns += parts["queue"]
        stats.compute_input.ns += parts["input"]
        stats.compute_infer.ns += parts["infer"]
        stats.compute_output.ns += parts["output"]
        stats.queue.count = stats.compute_input.count = stats.compute_infer.count = stats.compute_output.count = success.count

    def failed(self, total_s: float) -> None:
        """Count a failed request, which took ``total_s`` seconds."""
        self.inference_stats.fail.add(round(total_s * 1e9))


class Stopwatch:
    """The parts of one request or run, in nanoseconds."""

    __slots__ = ("_lap", "_started", "parts")

    def __init__(self) -> None:
        self._started = self._lap = time.perf_counter_ns()
        self.parts: dict[Part, int] = {"queue": 0, "input": 0, "infer": 0, "output": 0}

    def end(self, part: Part) -> None:
        """Count the time since the last call, or the start, as this part."""
        now = time.perf_counter_ns()
        self.parts[part] += now - self._lap
        self._lap = now

    @property
    def total_ns(self) -> int:
        """Since the start."""
        return time.perf_counter_ns() - self._started


class _Recorded(Stopwatch):
    """A context manager as a class: a generator would cost three times as much for every request."""

    __slots__ = ("_entry", "_n_rows", "_statistics")

    def __init__(self, statistics: Statistics, entry: ModelStatistics, n_rows: int) -> None:
        super().__init__()
        self._statistics = statistics
        self._entry = entry
        self._n_rows = n_rows

    def __enter__(self) -> Stopwatch:
        self._statistics.n_in_flight[self._entry.name, self._entry.version] += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._statistics.n_in_flight[self._entry.name, self._entry.version] -= 1
        if error is None:
            self._entry.succeeded(1, n_rows=self._n_rows, total_ns=self.total_ns, parts=self.parts)
            self._statistics.durations.record_parts(self.parts, self._n_rows)
        else:
            self._entry.failed(self.total_ns / 1e9)


class PhaseDurations:
    """Histograms of the parts of successful requests, and of the calls that answered them, over all models."""

    __slots__ = ("call_requests", "call_rows", "compute", "hop", "queue")

    def __init__(self) -> None:
        self.queue = Histogram()
        self.compute = Histogram()
        self.hop = Histogram()
        self.call_rows = Histogram(SIZE_BOUNDS)
        self.call_requests = Histogram(SIZE_BOUNDS)

    def record_call(self, phase: Histogram, waits_s: Sequence[float], call_s: float, n_rows: int) -> None:
        """Record a call.

        Args:
            phase: `hop` or `compute`.
            waits_s: how long each of its requests was queued.
            call_s: how long it took.
            n_rows: of all of them.
        """
        n_requests = len(waits_s)
        counts, bounds = self.queue.counts, self.queue.bounds
        for wait_s in waits_s:
            counts[bisect_left(bounds, wait_s)] += 1
            self.queue.sum += wait_s
        phase.counts[bisect_left(bounds, call_s)] += n_requests
        phase.sum += call_s * n_requests
        sizes, bounds = self.call_rows, self.call_rows.bounds
        sizes.counts[bisect_left(bounds, n_rows)] += 1
        sizes.sum += n_rows
        merged = self.call_requests
        merged.counts[bisect_left(bounds, n_requests)] += 1
        merged.sum += n_requests

    def record_parts(self, parts: Mapping[Part, int], n_rows: int) -> None:
        """Record a request that transforms here and calls the next stage."""
        self.queue.observe(parts["queue"] / 1e9)
        self.compute.observe((parts["input"] + parts["output"]) / 1e9)
        self.hop.observe(parts["infer"] / 1e9)
        self.call_rows.observe(n_rows)
        self.call_requests.observe(1)


class Statistics:
    """Counts by model and version. Not thread-safe; a `Stopwatch` may be used in another thread."""

    def __init__(self) -> None:
        self.durations = PhaseDurations()
        self.n_in_flight: Counter[tuple[str, str]] = Counter()
        """Requests that are being `recorded`, by model and version."""
        self._models: dict[tuple[str, str], ModelStatistics] = {}
        self._batches: dict[tuple[str, str, int], BatchStatistics] = {}

    def recorded(self, model: str, version: str, *, n_rows: int) -> _Recorded:
        """Count the request that the ``with`` block handles: as failed if an exception leaves the block, otherwise as successful.

        Args:
            model: an existing one, since entries are kept.
            version: that serves the request.
            n_rows: of the request.
        """
        return _Recorded(self, self.of(model, version), n_rows)

    def record_run(self, model: str, version: str, *, n_rows: int, parts: dict[Part, int]) -> None:
        """Count a run of one or several requests."""
        entry = self.of(model, version)
        entry.execution_count += 1
        batch = self._batches.get((model, version, n_rows))
        if batch is None:
            if len(entry.batch_stats) >= N_BATCH_SIZES:
                return
            batch = self._batches[model, version, n_rows] = BatchStatistics(n_rows)
            entry.batch_stats.append(batch)
        batch.compute_input.add(parts["input"])
        batch.compute_infer.add(parts["infer"])
        batch.compute_output.add(parts["output"])

    def of(self, model: str, version: str) -> ModelStatistics:
        """The counts of an existing version; they are kept."""
        entry = self._models.get((model, version))
        if entry is None:
            entry = self._models[model, version] = ModelStatistics(model, version)
        return entry

    def find(self, model: str, version: str) -> ModelStatistics:
        """The counts of a version; zeros for one without requests."""
        return self._models.get((model, version)) or ModelStatistics(model, version)

    def report(self, states: Iterable[ModelState], model: str = "", version: str = "") -> list[ModelStatistics]:
        """The counts of all ready versions, zeros for those without requests.

        Args:
            states: the service's index.
            model: only its versions; "": all models.
            version: only this one; "": all.

        Raises:
            NotFound: no such model or version.
        """
        requested = [state for state in states if model in ("", state.name) and is_named(state.version, version)]
        if model and not requested:
            raise NotFound(unknown_model(model) + (f", version {version[:32]}" if version else ""), model=model[:128])
        return [
            self._models.get((state.name, state.version), ModelStatistics(state.name, state.version))
            for state in requested
            if state.state == READY
        ]
