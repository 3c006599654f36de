"""The recorder of requests: which labels exist, and for how long."""

from __future__ import annotations

from splitserve.errors import TABLE
from splitserve.telemetry.families import FAILURES, OK, REQUEST_SECONDS, REQUESTS
from splitserve.telemetry.recorders import HistogramValue, latency_bounds
from splitserve.telemetry.requests import MAX_SERIES, RequestRecorder


def all_counts(recorder: RequestRecorder) -> dict[tuple[str, ...], object]:
    """By model, release, protocol and code."""
    samples = [sample for sample in recorder.collect("proxy") if sample is not None]
    return {labels[1:]: value for family, labels, value in samples if family is REQUESTS}


def counts(recorder: RequestRecorder) -> dict[tuple[str, ...], object]:
    """Without failures that have not occurred."""
    return {labels: value for labels, value in all_counts(recorder).items() if value or labels[-1] == OK}


def test_a_release_begins_at_zero() -> None:
    """So that ``increase`` sees the first request."""
    recorder = RequestRecorder(("rest", "grpc"))

    recorder.know({("m", "1.1")})

    assert counts(recorder) == {("m", "1.1", "rest", "OK"): 0, ("m", "1.1", "grpc", "OK"): 0}


def test_failures_of_each_code_begin_at_zero() -> None:
    """Of releases, of requests that were bound to none, and of unknown models: ``increase`` sees the first of each."""
    recorder = RequestRecorder(("rest", "grpc"))
    unknown = {("unknown", "", protocol, code) for protocol in ("rest", "grpc") for code in FAILURES}
    assert all_counts(recorder) == dict.fromkeys(unknown, 0)

    recorder.know({("m", "1.1")})

    known = {("m", release, protocol, code) for release in ("1.1", "") for protocol in ("rest", "grpc") for code in FAILURES}
    assert {labels for labels, n in all_counts(recorder).items() if n == 0 and labels[-1] != OK} == unknown | known


def test_the_codes_are_those_of_the_table_of_errors() -> None:
    """One that is missing here would begin with its first failure, which ``increase`` does not see."""
    assert set(FAILURES) == {error.grpc_code for error in TABLE} | {"CANCELLED"}


def test_with_very_many_releases_only_the_first_codes_begin_at_zero() -> None:
    """So that a scrape stays small."""
    recorder, codes = RequestRecorder(), {}

    for n_models in (50, 100, 300):
        recorder.know({(f"m{model}", f"{release}.1") for model in range(n_models) for release in (1, 2)})
        found = all_counts(recorder)
        codes[n_models] = {labels[-1] for labels in found}
        assert len(found) <= MAX_SERIES

    assert codes == {50: {OK, *FAILURES}, 100: {OK, *FAILURES[:3]}, 300: {OK}}


def test_the_threshold_of_an_objective_is_a_bound() -> None:
    """What is faster than it is counted exactly."""
    recorder = RequestRecorder(("rest",))
    recorder.use_bounds(latency_bounds([0.037]))

    recorder.succeeded("rest", "m", "1.1", 0.0, 0.0)

    [value] = [sample.value for sample in recorder.collect("proxy") if sample is not None and sample.family is REQUEST_SECONDS]
    assert isinstance(value, HistogramValue)
    assert len(value.counts) == len(latency_bounds([0.037])) + 1
    assert 0.037 in latency_bounds([0.037])


def test_made_up_names_share_one_series() -> None:
    """Whatever callers name, the number of series is bounded."""
    recorder = RequestRecorder(("rest",))
    recorder.know({("m", "1.1")})

    for index in range(10_000):
        recorder.failed("rest", f"made-up-{index}", f"{index}.1", "NOT_FOUND")
        recorder.failed("rest", "m", f"{index}.7", "NOT_FOUND")

    assert counts(recorder) == {
        ("m", "1.1", "rest", "OK"): 0,
        ("unknown", "", "rest", "NOT_FOUND"): 10_000,
        ("m", "", "rest", "NOT_FOUND"): 10_000,
    }


def test_series_of_what_no_longer_exists_go() -> None:
    """Also those of failures; what was counted as unknown stays."""
    recorder = RequestRecorder(("rest",))
    for index in range(200):
        recorder.know({("m", f"{index}.1")})
        recorder.succeeded("rest", "m", f"{index}.1", 0.0, 0.0)
        recorder.failed("rest", "m", f"{index}.1", "INTERNAL")
        recorder.failed("rest", "n", "", "NOT_FOUND")

    recorder.know({("o", "1.1")})
    recorder.succeeded("rest", "m", "199.1", 0.0, 0.0)  # in flight while it was unloaded
    recorder.know({("o", "1.2")})

    assert counts(recorder) == {("o", "1.2", "rest", "OK"): 0, ("unknown", "", "rest", "NOT_FOUND"): 200}


def test_what_cannot_be_counted_raises_nothing() -> None:
    """A defect of telemetry fails no request; it is counted."""
    recorder = RequestRecorder(("rest",))

    recorder.succeeded("no such protocol", "m", "1.1", 0.0, 0.0)

    assert recorder.n_failures == 1
