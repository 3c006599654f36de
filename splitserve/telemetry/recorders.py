"""What is written while requests are served: integers on the event loop, without locks. Read by a scrape in one step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import msgspec

LATENCY_BOUNDS = tuple(
    round(step * 10.0**exponent, 9) for exponent in range(-4, 3) for step in (1, 2, 3, 5)
)  # 100 µs, 200 µs, 300 µs, 500 µs, 1 ms … 500 s
"""Upper bounds in seconds: from 100 µs to beyond the longest deadline, each at most twice the one before."""

SIZE_BOUNDS = tuple(float(2**exponent) for exponent in range(13))  # 1, 2, 4 … 4096
"""Upper bounds of rows, or requests, of a call."""


def latency_bounds(thresholds_s: Iterable[float]) -> tuple[float, ...]:
    """`LATENCY_BOUNDS` and these: what is below a threshold is counted exactly only if it is a bound."""
    return tuple(sorted({*LATENCY_BOUNDS, *(round(threshold_s, 9) for threshold_s in thresholds_s)}))


class Exemplar(msgspec.Struct, frozen=True):
    """A value that was recorded for a request that is traced; ``at`` is in Unix time."""

    value: float
    at: float
    trace_id: str
    span_id: str


class HistogramValue(msgspec.Struct, frozen=True):
    """A histogram at one moment: ``counts`` of each bucket alone, the last one above all bounds, and the sum of the values.

    ``exemplars``: by the index of the bucket, the last of each.
    """

    counts: tuple[int, ...]
    sum: float
    exemplars: dict[int, Exemplar] = {}

    def __add__(self, other: HistogramValue) -> HistogramValue:
        counts = tuple(one + another for one, another in zip(self.counts, other.counts, strict=True))
        exemplars = {**self.exemplars, **other.exemplars} if self.exemplars or other.exemplars else {}
        return HistogramValue(counts, self.sum + other.sum, exemplars)


class Histogram:
    """Counts of values by bucket, and their sum. Not thread-safe: a value is recorded, and all are read, on the event loop.

    Args:
        bounds: upper bounds of the buckets, ascending; a value that equals one is in its bucket.
    """

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, n: int = 1) -> None:
        """Record a value ``n`` times."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.sum += value * n

    def observe_each(self, values: Iterable[float]) -> None:
        """Record several values."""
        counts, bounds = self.counts, self.bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self.sum += value

    def read(self) -> HistogramValue:
        """All of it, at this moment."""
        return HistogramValue(tuple(self.counts), self.sum, dict(self.exemplars))
