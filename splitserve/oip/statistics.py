"""What was inferred since the process began, and how long each part of it took. Source: Triton's "statistics" extension.

Each service counts its own work. What ``compute_input``, ``compute_infer`` and ``compute_output`` are: at predict making arrays,
running the model, making tensors (of a run; of a request the three count as ``compute_infer``, and ``compute_input`` is checking
it); at preprocess transforming, calling predict, the postprocess step; at the proxy checking the request, calling preprocess,
nothing. ``queue`` is waiting to be sent, or for a free thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Literal

import msgspec

from splitserve.errors import NotFound
from splitserve.oip.messages import READY, ModelState
from splitserve.versions import unknown_model

N_BATCH_SIZES = 128
"""Different numbers of rows that are counted apart; what comes later is counted in the sums only."""

Part = Literal["queue", "input", "infer", "output"]


class Duration(msgspec.Struct):
    """How often something was done, and the nanoseconds that it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.ns += ns


class InferStatistics(msgspec.Struct):
    """By request. ``success`` and ``fail`` are whole requests; the rest are parts of those that succeeded."""

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
    """One version of a model, with the protocol's names.

    ``last_inference`` is in milliseconds since the epoch, 0 if there was none. ``inference_count`` counts rows,
    ``execution_count`` runs, which can be of several requests.
    """

    name: str
    version: str
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferStatistics = msgspec.field(default_factory=InferStatistics)
    batch_stats: list[BatchStatistics] = []

    def succeeded(self, n_requests: int, *, n_rows: int, total_ns: int, parts: Mapping[Part, int]) -> None:
        """Count requests that were answered.

        Args:
            n_requests: those of one call, or one.
            n_rows: of all of them.
            total_ns: the sum of what each took.
            parts: the sums of its parts.
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
        """Count a request that was not answered, after so many seconds."""
        self.inference_stats.fail.add(round(total_s * 1e9))


class Stopwatch:
    """The parts of one request or run, in nanoseconds. Each lap belongs to the part that it is said to end."""

    __slots__ = ("_lap", "_started", "parts")

    def __init__(self) -> None:
        self._started = self._lap = time.perf_counter_ns()
        self.parts: dict[Part, int] = {"queue": 0, "input": 0, "infer": 0, "output": 0}

    def end(self, part: Part) -> None:
        """What was done since the last call, or the start, was this part."""
        now = time.perf_counter_ns()
        self.parts[part] += now - self._lap
        self._lap = now

    @property
    def total_ns(self) -> int:
        """Since the start."""
        return time.perf_counter_ns() - self._started


class _Recorded(Stopwatch):
    """A class, because a generator would cost three times as much, and that for every request."""

    __slots__ = ("_entry", "_n_rows")

    def __init__(self, entry: ModelStatistics, n_rows: int) -> None:
        super().__init__()
        self._entry = entry
        self._n_rows = n_rows

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._entry.succeeded(1, n_rows=self._n_rows, total_ns=self.total_ns, parts=self.parts)
        else:
            self._entry.failed(self.total_ns / 1e9)


class Statistics:
    """Counts by model and version. Not for several threads; a `Stopwatch` may be carried into one."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelStatistics] = {}
        self._batches: dict[tuple[str, str, int], BatchStatistics] = {}

    def recorded(self, model: str, version: str, *, n_rows: int) -> _Recorded:
        """Count the request that is handled inside the ``with``: as a success, or as a failure if it is left by an exception.

        Args:
            model: that exists: entries are kept.
            version: the one that serves the request.
            n_rows: of the request.
        """
        return _Recorded(self.of(model, version), n_rows)

    def record_run(self, model: str, version: str, *, n_rows: int, parts: dict[Part, int]) -> None:
        """Count a run, of one request or of several together."""
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
        """The counts of a version that exists; they are kept."""
        entry = self._models.get((model, version))
        if entry is None:
            entry = self._models[model, version] = ModelStatistics(model, version)
        return entry

    def report(self, states: Iterable[ModelState], model: str = "", version: str = "") -> list[ModelStatistics]:
        """Those of the versions that are ready; one that was never asked for has zeros.

        Args:
            states: the service's index.
            model: only its versions; "" is all models.
            version: only this one; "" is all.

        Raises:
            NotFound: no such model or version.
        """
        wanted = [state for state in states if model in ("", state.name) and version in ("", state.version)]
        if model and not wanted:
            raise NotFound(unknown_model(model) + (f", version {version[:32]}" if version else ""), model=model[:128])
        return [
            self._models.get((state.name, state.version), ModelStatistics(state.name, state.version))
            for state in wanted
            if state.state == READY
        ]
