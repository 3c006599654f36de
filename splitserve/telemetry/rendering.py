"""A snapshot as Prometheus or OpenMetrics text, by prometheus_client, which is imported at the first scrape."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from splitserve.telemetry.recorders import HistogramValue
from splitserve.telemetry.registry import Family, Labels, Snapshot, Value, samples_in

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OPENMETRICS = "application/openmetrics-text"

_CLIENT = "prometheus_client.exposition"

_SLICE = 200
"""Samples that are rendered before other work gets its turn: about a millisecond where they are new."""

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


_Encode = Callable[[Any], bytes]


class Renderer:
    """Makes the text of snapshots, in slices, between which the event loop does other work.

    prometheus_client takes some microseconds for a sample. Of counters and gauges, which are nearly all of a large scrape, the
    beginning of each line is kept for the next one: its name and labels.

    Args:
        families: what is shown, in this order.
    """

    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families
        self._beginnings: dict[tuple[bool, str], dict[Labels, bytes]] = {}
        """By format and family, then by labels: the line up to its value."""

    async def render(self, snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
        """The text of a snapshot, and its media type.

        Args:
            snapshot: the values.
            accept: the header of the request: OpenMetrics if it asks for that, else Prometheus' own format.
        """
        encode, media_type = await _encoder(accept)
        is_open = media_type.startswith(OPENMETRICS)
        parts: list[bytes] = []
        for family, values in samples_in(snapshot, self._families):
            items = list(values.items())
            if family.kind == "histogram":
                await _add_histograms(parts, family, items, encode)
            else:
                known = self._beginnings.get((is_open, family.name), {})
                self._beginnings[is_open, family.name] = await _add_values(parts, family, items, encode, known)
        if is_open:
            parts.append(_END)
        return b"".join(parts), media_type


async def render(snapshot: Snapshot, families: Mapping[str, Family], accept: str) -> tuple[bytes, str]:
    """As `Renderer.render`, once."""
    return await Renderer(families).render(snapshot, accept)


async def _encoder(accept: str) -> tuple[_Encode, str]:
    if _CLIENT not in sys.modules:  # takes tens of milliseconds, in which requests go on
        await asyncio.to_thread(importlib.import_module, _CLIENT)
    from prometheus_client.exposition import choose_encoder

    encode, media_type = choose_encoder(accept)
    return encode, media_type


async def _add_histograms(parts: list[bytes], family: Family, items: list[tuple[Labels, Value]], encode: _Encode) -> None:
    step = max(1, _SLICE // (len(family.bounds) + 3))
    for start in range(0, len(items), step):
        text = encode(_Slice(_metric(family, items[start : start + step])))
        parts.append(b"\n".join([*_samples_in(text), b""]) if start else text.removesuffix(_END))
        await asyncio.sleep(0)


async def _add_values(
    parts: list[bytes], family: Family, items: list[tuple[Labels, Value]], encode: _Encode, known: Mapping[Labels, bytes]
) -> dict[Labels, bytes]:
    """Add the lines of a counter or gauge. Returns how the line of each sample begins."""
    from prometheus_client.utils import floatToGoString

    found: dict[Labels, bytes] = {}
    parts.append(encode(_Slice(_metric(family, []))).removesuffix(_END))
    for start in range(0, len(items), _SLICE):
        new = [item for item in items[start : start + _SLICE] if item[0] not in known]
        if new:
            lines = _samples_in(encode(_Slice(_metric(family, new))))
            found.update((labels, line.rpartition(b" ")[0]) for (labels, _), line in zip(new, lines, strict=True))
        for labels, value in items[start : start + _SLICE]:
            beginning = known.get(labels) or found[labels]
            found[labels] = beginning
            parts.append(b"%b %b\n" % (beginning, floatToGoString(value).encode()))  # type: ignore[no-untyped-call]
        await asyncio.sleep(0)
    return found


def _samples_in(text: bytes) -> list[bytes]:
    """The lines of samples alone, without those that describe their family."""
    return [line for line in text.split(b"\n") if line and not line.startswith(b"#")]


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
            metric.add_metric(labels, buckets=_cumulative(family.bounds, value), sum_value=value.sum)
        else:
            metric.add_metric(labels, value)
    return metric


def _cumulative(bounds: tuple[float, ...], value: HistogramValue) -> list[tuple[Any, ...]]:
    """Each bucket's bound, count and, where there is one, exemplar."""
    names = [*map(repr, bounds), "+Inf"]
    buckets: list[tuple[Any, ...]] = list(zip(names, accumulate(value.counts), strict=True))
    if value.exemplars:
        from prometheus_client.samples import Exemplar

        for index, each in value.exemplars.items():
            labels = {"trace_id": each.trace_id, "span_id": each.span_id}
            buckets[index] = (*buckets[index], Exemplar(labels, each.value, each.at))
    return buckets
