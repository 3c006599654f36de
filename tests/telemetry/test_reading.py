"""What two scrapes say: rates, quantiles, and the view that is made of them."""

from __future__ import annotations

import pytest

from splitserve.telemetry import families
from splitserve.telemetry.reading import Interval, NotMetrics, Scrape
from splitserve.telemetry.recorders import LATENCY_BOUNDS, Histogram
from splitserve.telemetry.registry import Snapshot
from splitserve.telemetry.views import ListenerView, Quantiles, View, view_of
from tests.admin_server import of_a_proxy, text_of


def between(before: Snapshot, after: Snapshot, seconds: float = 10.0) -> Interval:
    return Interval(Scrape(text_of(before), 100.0), Scrape(text_of(after), 100.0 + seconds))


def view(before: Snapshot, after: Snapshot) -> View:
    return view_of(2000.0, [(ListenerView("http://127.0.0.1:1"), between(before, after))])


def test_rates_are_increases_by_the_time_between() -> None:
    """Over all series, or those with some labels."""
    interval = between(of_a_proxy(n_answered=100, n_failed=1), of_a_proxy(n_answered=150, n_failed=6))

    assert interval.per_s(families.REQUESTS) == 5.5
    assert interval.per_s(families.REQUESTS, code="UNAVAILABLE") == 0.5
    assert interval.per_s(families.REQUESTS, stage="predict") is None
    assert interval.per_s_by(families.REQUESTS, ("code",)) == {("OK",): 5.0, ("UNAVAILABLE",): 0.5}


def test_a_counter_that_falls_began_again() -> None:
    """The service was restarted between the two: what it has counted since then is counted."""
    interval = between(of_a_proxy(n_answered=100), of_a_proxy(n_answered=30))

    assert interval.per_s(families.REQUESTS, code="OK") == 3.0
    assert interval.mean(families.CALL_ROWS) == 2.0
    assert interval.quantile(families.REQUEST_SECONDS, 0.5) is not None


def test_one_scrape_says_nothing_about_rates() -> None:
    """Counts since the start of a process would be mistaken for those of now."""
    interval = Interval(None, Scrape(text_of(of_a_proxy(n_answered=100)), 100.0))

    assert interval.per_s(families.REQUESTS) is None
    assert interval.per_s_by(families.REQUESTS, ("code",)) == {}
    assert interval.quantile(families.REQUEST_SECONDS, 0.5) is None
    assert interval.now.value(families.QUEUED) == 3


@pytest.mark.parametrize(("durations_s", "q", "expected_s"), [
    ([0.0015] * 100, 0.5, 0.0015), ([0.0015] * 100, 0.99, 0.00199), ([0.0015] * 98 + [0.25] * 2, 0.99, 0.25),
    ([1e4], 0.99, 500.0),
])  # fmt: skip
def test_a_quantile_is_interpolated_within_its_bucket(durations_s: list[float], q: float, expected_s: float) -> None:
    """As Prometheus does it; above the last bound it is that bound."""
    histogram = Histogram(LATENCY_BOUNDS)
    histogram.observe_each(durations_s)
    name = families.REQUEST_SECONDS.name
    interval = between(
        {name: {("proxy", "rest"): Histogram(LATENCY_BOUNDS).read()}}, {name: {("proxy", "rest"): histogram.read()}}
    )

    assert interval.quantile(families.REQUEST_SECONDS, q, stage="proxy") == pytest.approx(expected_s)


def test_what_is_no_metrics_is_said() -> None:
    """Another program may answer there."""
    with pytest.raises(NotMetrics):
        Scrape('requests_total{code="200" 1\n', 0.0)


def test_a_view_has_what_happened_and_how_it_is() -> None:
    """Of a stage, its releases, and its process."""
    found = view(of_a_proxy(n_answered=100), of_a_proxy(n_answered=150, n_failed=5))

    [stage], [release], [listener] = found.stages, found.releases, found.listeners
    assert (stage.requests_per_s, stage.errors_per_s, stage.rows_per_call) == (5.5, {"UNAVAILABLE": 0.5}, 2.0)
    assert stage.latency == Quantiles(1.5, 1.99) == stage.phases["hop"]
    assert (stage.is_ready, stage.queued, stage.replicas) == (True, 3, {"ready": 1, "not_ready": 1})
    assert (release.model, release.release, release.ready_since) == ("m", "1.1", 1000.0)
    assert (release.requests_per_s, release.failures_per_s, release.rows_per_s, release.mean_ms) == (5.5, 0.5, 10.0, 1.5)
    assert (listener.version, listener.workers) == ("0.1.0", None)


def test_gauges_of_workers_become_one() -> None:
    """The queue of a service is that of all its workers; what all of them say of the same thing is not added."""
    of_workers: Snapshot = {
        families.READY.name: {("proxy", "0"): 0, ("proxy", "1"): 1},
        families.QUEUED.name: {("proxy", "m", "1.1", "0"): 3, ("proxy", "m", "1.1", "1"): 4},
        families.INFERENCES.name: {("proxy", "m", "1.1", "succeeded"): 1},
        families.LOADED_AT.name: {("proxy", "m", "1.1", "0"): 1500.0, ("proxy", "m", "1.1", "1"): 1600.0},
        families.GOLDEN_ERROR.name: {("proxy", "m", "1.1", "0"): 0.25, ("proxy", "m", "1.1", "1"): 0.5},
        families.WORKER_UP.name: {("0",): 1, ("1",): 0},
    }

    found = view(of_workers, of_workers)

    assert (found.stages[0].is_ready, found.stages[0].queued) == (True, 7)
    [release] = found.releases
    assert (release.queued, release.ready_since, release.golden_error_ratio) == (7, 1600.0, 0.5)
    assert (found.listeners[0].workers, found.listeners[0].workers_up) == (2, 1)
