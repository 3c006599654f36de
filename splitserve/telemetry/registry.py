"""What is known of a process at one moment: families of metrics, and their samples, which several processes may add up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

import msgspec

from splitserve.telemetry.recorders import HistogramValue

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Value = int | float | HistogramValue
V = TypeVar("V", int, float, HistogramValue)


class Family(msgspec.Struct, frozen=True):
    """Metrics of one name: docs/metrics.md is written from them.

    ``bounds`` are those of a histogram.
    """

    name: str
    kind: Kind
    meaning: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """By Prometheus' conventions the end of the name; "" if it is a number of things."""
        base = self.name.removesuffix("_total")
        return next((unit for unit in ("seconds", "bytes") if base.endswith(f"_{unit}")), "")


class Sample(NamedTuple):
    """A value of a family; the labels are in its order."""

    family: Family
    labels: Labels
    value: Value


Snapshot = dict[str, dict[Labels, Value]]
"""By the name of the family, then by labels."""

Collect = Callable[[], Iterable[Sample | None]]
"""Reads recorders, without waiting for anything. After a None other work may run: what has to agree is between two of them."""


class Registry:
    """The families of a process, and what reads their values.

    Args:
        families: what is shown, in this order.
        failures: of these, how often telemetry itself has failed, by part; the label is the part.
    """

    def __init__(self, families: Iterable[Family], failures: Family) -> None:
        self.families = {family.name: family for family in families}
        self._failures = failures
        self._n_failed: Counter[str] = Counter()
        self._collectors: list[tuple[str, Collect]] = []

    def add(self, part: str, collect: Collect) -> None:
        """Read these values at each scrape. A failure of one part is counted, and the others are shown."""
        self._collectors.append((part, collect))

    def failed(self, part: str) -> None:
        """Count a failure of telemetry; the first of a part is logged, with its traceback."""
        self._n_failed[part] += 1
        if self._n_failed[part] == 1:
            import structlog  # commands read metrics without it

            # Metrics of this part are missing; no request is affected. Further failures are only counted.
            structlog.get_logger().exception("telemetry failed", part=part)

    async def snapshot(self) -> Snapshot:
        """All values. Buckets, count and sum of a histogram are of one moment, and so are all histograms of a part."""
        found: Snapshot = {}
        for part, collect in self._collectors:
            of_part: Snapshot = {}
            try:
                for sample in collect():
                    if sample is None:
                        await asyncio.sleep(0)
                        continue
                    family, labels, value = sample
                    values = of_part.get(family.name)
                    if values is None:
                        values = of_part[family.name] = {}
                    values[labels] = value
            except Exception:
                self.failed(part)
                continue
            for name, values in of_part.items():
                found.setdefault(name, {}).update(values)
        parts = dict.fromkeys(part for part, _ in self._collectors) | self._n_failed
        found.setdefault(self._failures.name, {}).update({(part,): self._n_failed[part] for part in parts})
        return found


def sums_of(snapshot: Snapshot, families: Mapping[str, Family]) -> Snapshot:
    """What outlives a process: counters and histograms, without gauges."""
    return {name: values for name, values in snapshot.items() if name in families and families[name].kind != "gauge"}


def added(snapshots: Iterable[tuple[str, Snapshot]], families: Mapping[str, Family]) -> Snapshot:
    """One snapshot of several processes: counters and histograms are added, gauges are told apart by their worker.

    Args:
        snapshots: each with its worker.
        families: those known; others are left out.
    """
    whole: Snapshot = {}
    for worker, snapshot in snapshots:
        for name, values in snapshot.items():
            family = families.get(name)
            if family is None:
                continue
            into = whole.setdefault(name, {})
            for labels, value in values.items():
                if family.kind == "gauge":
                    into[(*labels, worker)] = value
                else:
                    into[labels] = _sum(into[labels], value) if labels in into else value
    return whole


def _sum(one: Value, another: Value) -> Value:
    if isinstance(one, HistogramValue):
        assert isinstance(another, HistogramValue), "values of a family are of one kind"
        return one + another
    assert not isinstance(another, HistogramValue), "values of a family are of one kind"
    return one + another


def samples_in(snapshot: Snapshot, families: Mapping[str, Family]) -> Iterator[tuple[Family, dict[Labels, Value]]]:
    """The families that have values, in their order."""
    for name, family in families.items():
        if snapshot.get(name):
            yield family, snapshot[name]
