"""What a load generator saw. Light to import: load generators are processes of their own, and start within a load's time."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.processes import BenchmarkError


class LoadResult(msgspec.Struct, frozen=True):
    """What a load generator saw. Latencies are in ms."""

    n_requests: int
    seconds: float
    n_failed: int
    p50_ms: float
    p99_ms: float
    p999_ms: float

    @property
    def per_s(self) -> float:
        """Requests answered in a second."""
        return self.n_requests / self.seconds


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least value of a sorted, non-empty sequence that so many percent of the values do not exceed (nearest rank)."""
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]


def of_latencies(latencies_ms: Sequence[float], *, seconds: float, n_failed: int = 0) -> LoadResult:
    """A load from the latencies of its requests."""
    if not latencies_ms:
        raise BenchmarkError("the load generator received no answer")
    ordered = sorted(latencies_ms)
    p50, p99, p999 = (percentile(ordered, percent) for percent in (50, 99, 99.9))
    return LoadResult(len(ordered), seconds, n_failed, p50, p99, p999)
