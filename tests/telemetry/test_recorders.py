"""Histograms, the registry of what is shown, and the text of a scrape."""

from __future__ import annotations

import asyncio
import gc
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from splitserve.telemetry.families import FAMILIES, TELEMETRY_FAILURES
from splitserve.telemetry.recorders import LATENCY_BOUNDS, Histogram, HistogramValue
from splitserve.telemetry.registry import Family, Registry, Sample, Snapshot, added, sums_of
from splitserve.telemetry.rendering import Renderer, render

COUNT = Family("made_total", "counter", "Made.", ("kind",))
LEVEL = Family("level", "gauge", "Level.", ("kind",))
TIMES = Family("times_seconds", "histogram", "Times.", ("kind",), (0.1, 1.0))
BY_NAME = {family.name: family for family in (COUNT, LEVEL, TIMES)}


def test_bounds_reach_from_100_us_beyond_the_longest_deadline() -> None:
    """Each is at most twice the one before, so that a quantile is within a factor of two of what a client measures."""
    ratios = [high / low for low, high in pairwise(LATENCY_BOUNDS)]

    assert LATENCY_BOUNDS[0] == 0.0001
    assert LATENCY_BOUNDS[-1] > 300
    assert max(ratios) < 2.0001
    assert {0.001, 0.005, 0.05, 0.1, 1.0} <= set(LATENCY_BOUNDS)


def test_a_value_at_a_bound_is_in_its_bucket() -> None:
    """Prometheus' buckets include their upper bound, ``le``."""
    histogram = Histogram((0.1, 1.0))

    histogram.observe(0.1)
    histogram.observe(0.5, 2)
    histogram.observe_each([7.0])

    assert histogram.read() == HistogramValue((1, 2, 1), 0.1 + 0.5 * 2 + 7.0)


def test_a_value_that_is_recorded_in_the_middle_of_another_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a finaliser or a callback of the garbage collector would, in the same thread: there is no lock to wait for."""
    histogram = Histogram((0.1, 1.0))

    def collect_garbage(bounds: tuple[float, ...], value: float) -> int:
        monkeypatch.setattr("splitserve.telemetry.recorders.bisect_left", bisect_left)
        gc.collect()
        return bisect_left(bounds, value)

    def on_collection(phase: str, _: object) -> None:
        if phase == "start":
            histogram.observe(0.5)

    monkeypatch.setattr("splitserve.telemetry.recorders.bisect_left", collect_garbage)
    gc.callbacks.append(on_collection)
    try:
        histogram.observe(7.0)
    finally:
        gc.callbacks.remove(on_collection)

    assert histogram.read() == HistogramValue((0, 1, 1), 7.5)


async def test_a_part_that_fails_is_counted_and_the_others_are_shown() -> None:
    """Telemetry never hides what works, and says what does not."""

    def broken() -> Iterator[Sample]:
        yield Sample(COUNT, ("lost",), 1)
        raise RuntimeError("broken")

    registry = Registry([COUNT, TELEMETRY_FAILURES], TELEMETRY_FAILURES)
    registry.add("good", lambda: [Sample(COUNT, ("a",), 3)])
    registry.add("bad", broken)

    await registry.snapshot()
    found = await registry.snapshot()

    assert found == {"made_total": {("a",): 3}, TELEMETRY_FAILURES.name: {("good",): 0, ("bad",): 2}}


def test_counts_of_workers_are_added_and_gauges_are_told_apart() -> None:
    """A sum of queue lengths would hide which worker is stuck."""
    one = {"made_total": {("a",): 1}, "level": {("a",): 5}, "times_seconds": {("a",): HistogramValue((1, 0, 2), 3.0)}}
    two = {"made_total": {("a",): 2, ("b",): 1}, "level": {("a",): 7}, "times_seconds": {("a",): HistogramValue((0, 1, 1), 4.0)}}

    whole = added([("0", one), ("1", two)], BY_NAME)

    assert whole == {
        "made_total": {("a",): 3, ("b",): 1},
        "level": {("a", "0"): 5, ("a", "1"): 7},
        "times_seconds": {("a",): HistogramValue((1, 1, 3), 7.0)},
    }
    assert sums_of(one, BY_NAME).keys() == {"made_total", "times_seconds"}


@pytest.mark.parametrize(("accept", "families_in"), [
    ("", text_string_to_metric_families),
    ("application/openmetrics-text; version=1.0.0", openmetrics_families),
])  # fmt: skip
async def test_both_formats_are_what_their_parsers_expect(accept: str, families_in: object) -> None:
    """Also if a family is so large that it is made in several slices."""
    snapshot = {
        "made_total": {(f"kind {index}",): index for index in range(1000)},
        "level": {('quote " \\ and\nline',): 2.5},
        "times_seconds": {(f"kind {index}",): HistogramValue((1, 2, 3), 9.5) for index in range(150)},
    }

    text, media_type = await render(snapshot, BY_NAME, accept)
    families = {family.name: family for family in families_in(text.decode())}  # type: ignore[operator]

    assert media_type.startswith(accept.partition(";")[0] or "text/plain")
    assert families.keys() == {"made", "level", "times_seconds"}
    assert sorted(sample.value for sample in families["made"].samples) == list(range(1000))
    assert families["level"].samples[0].labels == {"kind": 'quote " \\ and\nline'}
    buckets = [sample.value for sample in families["times_seconds"].samples if sample.labels == {"kind": "kind 7", "le": "+Inf"}]
    counts = [sample.value for sample in families["times_seconds"].samples if sample.name.endswith("_count")]
    assert buckets == [6]
    assert counts == [6] * 150


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_later_scrape_is_as_the_first_one_would_be(accept: str) -> None:
    """What is kept between scrapes changes nothing: values that changed, series that came and went, workers that joined."""
    renderer = Renderer(BY_NAME)
    snapshots: list[Snapshot] = [
        {"made_total": {("a",): 1, ("b",): 1_234_567_890}, "level": {("a",): 0.5}},
        {"made_total": {('c\n\r"',): 7, ("b",): 2.5}, "level": {("a",): float("inf")}, "times_seconds": {}},
        {"made_total": {("a",): 2}, "level": {("a", "0"): 1, ("a", "1"): float("nan")}},
        {"made_total": {("a",): 3}, "level": {("a",): 2}, "times_seconds": {("a",): HistogramValue((1, 2, 3), 9.5)}},
    ]

    for snapshot in snapshots:
        assert await renderer.render(snapshot, accept) == await render(snapshot, BY_NAME, accept)
    text, _ = await renderer.render(snapshots[0], accept)

    by_client = prometheus_client.CollectorRegistry()
    gauge = prometheus_client.Gauge("level", "Level.", ["kind"], registry=by_client)
    gauge.labels("a").set(0.5)
    assert prometheus_client.generate_latest(by_client) in text.replace(b"# EOF\n", b"")


async def test_other_work_gets_its_turn_while_a_large_scrape_is_rendered() -> None:
    """The event loop answers requests between slices."""
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(other_work())
    await render({"made_total": {(str(index),): 1 for index in range(10_000)}}, BY_NAME, "")
    working.cancel()

    assert turns >= 10_000 // 200


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Counters end in ``_total``, nothing else does; names are unique; each has a meaning."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.meaning.endswith("."), family.name
        assert bool(family.bounds) == (family.kind == "histogram"), family.name
