"""The recorder of requests: which labels exist, and for how long."""

from __future__ import annotations

from splitserve.telemetry.families import REQUESTS
from splitserve.telemetry.requests import RequestRecorder


def counts(recorder: RequestRecorder) -> dict[tuple[str, ...], object]:
    """By model, release, protocol and code."""
    return {labels[1:]: value for family, labels, value in recorder.collect("proxy") if family is REQUESTS}


def test_a_release_begins_at_zero() -> None:
    """So that ``increase`` sees the first request."""
    recorder = RequestRecorder(("rest", "grpc"))

    recorder.know({("m", "1.1")})

    assert counts(recorder) == {("m", "1.1", "rest", "OK"): 0, ("m", "1.1", "grpc", "OK"): 0}


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
