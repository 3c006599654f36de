"""One measurement: a load on a system, with what it cost each stage."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from benchmarks import answers, loads
from benchmarks.latencies import LoadResult
from benchmarks.processes import BenchmarkError, RunningSystem
from benchmarks.workloads import Workload

Protocol = Literal["REST JSON", "REST binary", "gRPC unary", "gRPC stream", "REST JSON, open loop"]

WARM_UP_S = 1.0


class Case(msgspec.Struct, frozen=True):
    """What is measured. ``per_s`` is the rate of arrivals in an open loop, where ``concurrency`` means nothing."""

    system: str
    model: str
    protocol: Protocol
    concurrency: int
    per_s: float = 0.0


class Measurement(msgspec.Struct, frozen=True):
    """The result. CPU by stage, in microseconds per request."""

    case: Case
    load: LoadResult
    cpu_us: Mapping[str, float]

    @property
    def total_cpu_us(self) -> float:
        return sum(self.cpu_us.values())


def measure(system: RunningSystem, case: Case, workload: Workload, *, seconds: float, answer_bytes: int = 0) -> Measurement:
    """Load for so many seconds, after a warm-up if the system has not had such a load yet.

    Args:
        system: running.
        case: of this system and workload.
        workload: what is asked.
        seconds: how long.
        answer_bytes: over gRPC, the size of an answer, as `answers.check_grpc` gives it.

    Raises:
        BenchmarkError: no request was answered, or the load generator failed.
    """
    if (case.model, case.protocol) not in system.warm:
        with suppress(BenchmarkError):  # a persistent failure shows in the load itself
            _load(system, case, workload, WARM_UP_S, answer_bytes)
        system.warm.add((case.model, case.protocol))
    before = system.cpu_s()
    load = _load(system, case, workload, seconds, answer_bytes)
    after = system.cpu_s()
    if not load.n_requests:
        raise BenchmarkError(f"{case.system}, {case.model}, {case.protocol}: nothing was answered within {seconds:g} s")
    return Measurement(case, load, {stage: (after[stage] - before[stage]) / load.n_requests * 1e6 for stage in after})


def _load(system: RunningSystem, case: Case, workload: Workload, seconds: float, answer_bytes: int) -> LoadResult:
    model, concurrency = workload.model, case.concurrency
    match case.protocol:
        case "REST JSON":
            return loads.rest(system.http, model, workload.rest_json(0), concurrency=concurrency, seconds=seconds)
        case "REST binary":
            return loads.rest(system.http, model, workload.rest_binary(0), concurrency=concurrency, seconds=seconds)
        case "gRPC unary":
            message = workload.grpc(0)
            return loads.grpc_unary(system.grpc, message, answer_bytes, concurrency=concurrency, seconds=seconds)
        case "gRPC stream":
            return loads.grpc_stream(system.grpc, workload, concurrency=concurrency, seconds=seconds)
        case "REST JSON, open loop":
            return loads.open_loop(system.http, model, workload.rest_json(0), per_s=case.per_s, seconds=seconds)


def check(system: RunningSystem, workload: Workload, protocols: Sequence[Protocol]) -> int:
    """That answers are right over each of these; size of a gRPC answer, 0 without gRPC.

    Raises:
        BenchmarkError: one is wrong.
    """
    if "REST JSON" in protocols:
        answers.check_rest(system.http, workload, workload.rest_json)
    if "REST binary" in protocols:
        answers.check_rest(system.http, workload, workload.rest_binary)
    if "gRPC unary" in protocols or "gRPC stream" in protocols:
        return answers.check_grpc(system.grpc, workload)
    return 0


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Of several of one case, value by value."""
    first = measurements[0]
    load = LoadResult(
        n_requests=sum(each.load.n_requests for each in measurements),
        seconds=sum(each.load.n_requests for each in measurements) / statistics.median(each.load.per_s for each in measurements),
        n_failed=sum(each.load.n_failed for each in measurements),
        p50_ms=statistics.median(each.load.p50_ms for each in measurements),
        p99_ms=statistics.median(each.load.p99_ms for each in measurements),
        p999_ms=statistics.median(each.load.p999_ms for each in measurements),
    )
    cpu_us = {stage: statistics.median(each.cpu_us[stage] for each in measurements) for stage in first.cpu_us}
    return Measurement(first.case, load, cpu_us)
