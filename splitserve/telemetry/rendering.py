"""A snapshot as Prometheus or OpenMetrics text, by prometheus_client, which is imported at the first scrape."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from splitserve.telemetry.recorders import HistogramValue
from splitserve.telemetry.registry import Family, Labels, Snapshot, Value, samples_in

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OPENMETRICS = "application/openmetrics-text"

_CLIENT = "prometheus_client.exposition"

_SLICE = 200
"""Samples that are rendered before other work gets its turn: about a millisecond."""

_END = b"# EOF\n"
"""Source: OpenMetrics, "Overall Structure"."""

WORKER = "worker"
"""The label of gauges that tells the processes of a service apart."""


class _Slice:
    """Implements prometheus_client's `Collector` on values that were read before."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


async def render(snapshot: Snapshot, families: Mapping[str, Family], accept: str) -> tuple[bytes, str]:
    """The text of a snapshot, and its media type.

    It is made in slices, between which the event loop does other work.

    Args:
        snapshot: the values.
        families: what is shown, in this order.
        accept: the header of the request: OpenMetrics if it asks for that, else Prometheus' own format.
    """
    if _CLIENT not in sys.modules:  # takes tens of milliseconds, in which requests go on
        await asyncio.to_thread(importlib.import_module, _CLIENT)
    from prometheus_client.exposition import choose_encoder

    encode, media_type = choose_encoder(accept)
    is_open = media_type.startswith(OPENMETRICS)
    parts = []
    for family, values in samples_in(snapshot, families):
        items = list(values.items())
        per_sample = len(family.bounds) + 3
        step = max(1, _SLICE // per_sample) if family.bounds else _SLICE
        for start in range(0, len(items), step):
            text: bytes = encode(_Slice(_metric(family, items[start : start + step])))
            parts.append(_without_head(text) if start else text)
            await asyncio.sleep(0)
    if is_open:
        parts = [part.removesuffix(_END) for part in parts] + [_END]
    return b"".join(parts), media_type


def _without_head(text: bytes) -> bytes:
    """The samples alone, after those of the same family."""
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith((b"# HELP", b"# TYPE", b"# UNIT")))


def _metric(family: Family, items: list[tuple[Labels, Value]]) -> Any:
    """As prometheus_client has it."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    made = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}[family.kind]
    names = family.labels
    if family.kind == "gauge" and items and len(items[0][0]) == len(names) + 1:
        names = (*names, WORKER)
    metric: Any = made(family.name, family.meaning, labels=names)
    for labels, value in items:
        if isinstance(value, HistogramValue):
            metric.add_metric(labels, buckets=_cumulative(family.bounds, value.counts), sum_value=value.sum)
        else:
            metric.add_metric(labels, value)
    return metric


def _cumulative(bounds: tuple[float, ...], counts: tuple[int, ...]) -> list[tuple[str, int]]:
    names = [*map(repr, bounds), "+Inf"]
    return list(zip(names, accumulate(counts), strict=True))
