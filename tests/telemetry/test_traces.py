"""Contexts in headers, and what the sampler makes of them."""

from __future__ import annotations

import pytest

from splitserve.telemetry import traces
from splitserve.telemetry.traces import Sampler, TraceContext, Tracer, parsed, received, received_in
from tests.telemetry.traced import CALLER, NOT_SAMPLED, SAMPLED, TRACE


@pytest.mark.parametrize("flags", ["00", "01", "03", "ff"])
def test_a_valid_traceparent_is_read(flags: str) -> None:
    assert parsed(f"00-{TRACE}-{CALLER}-{flags}") == (TRACE, CALLER, int(flags, 16))


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert parsed(f"01-{TRACE}-{CALLER}-01-more") == (TRACE, CALLER, 1)


@pytest.mark.parametrize(
    "value",
    [
        "", "-", f"ff-{TRACE}-{CALLER}-01", f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{CALLER}-01", f"00-{TRACE}-{CALLER}-01-more", f"00-{TRACE}-{CALLER}-1", f"{SAMPLED},{SAMPLED}",
        f"{SAMPLED} ", f"00-{TRACE[:-1]}-{CALLER}-01", f"00-{TRACE}-{CALLER}-0G", f"01-{TRACE}-{CALLER}-01more", f"{SAMPLED}\n",
    ],
)  # fmt: skip
def test_an_invalid_traceparent_is_no_context(value: str) -> None:
    """And its tracestate goes with it; baggage does not depend on it."""
    assert received(value, "vendor=1", "") is None
    context = received(value, "vendor=1", "user=1")
    assert context is not None
    assert context.items() == [("baggage", "user=1")]


def test_values_that_fit_go_on_unchanged() -> None:
    context = received_in([("traceparent", SAMPLED), ("tracestate", " a=1 , b=2,"), ("baggage", "k = v;p=1 ,"), ("other", "x")])
    assert context is not None
    assert context.items() == [("traceparent", SAMPLED), ("tracestate", " a=1 , b=2,"), ("baggage", "k = v;p=1 ,")]


def test_two_headers_of_a_kind_are_joined_as_http_does() -> None:
    context = received_in([("tracestate", "a=1"), ("traceparent", SAMPLED), ("tracestate", "b=2")])
    assert context is not None
    assert context.tracestate == "a=1,b=2"
    assert received_in([("traceparent", SAMPLED), ("traceparent", SAMPLED)]) is None


def test_long_values_are_bounded() -> None:
    """Whole members are left out: of tracestate the long ones first, then the last ones."""
    state = ",".join([f"a{n}=1" for n in range(60)])
    context = received(SAMPLED, state, ",".join([f"k{n}={'v' * 200}" for n in range(60)]))
    assert context is not None
    assert context.tracestate == ",".join([f"a{n}=1" for n in range(32)])
    assert 8000 - 210 < len(context.baggage) <= 8192
    assert context.baggage.endswith("v" * 200)
    long = received(SAMPLED, f"first=1,{'x' * 200}=2,{','.join(['last=' + 'y' * 100] * 9)}", "")
    assert long is not None
    assert long.tracestate == ",".join(["first=1", *["last=" + "y" * 100] * 4])


@pytest.mark.parametrize("value", ["k=\xe9", "k=\x00", "k=\n"])
def test_values_that_are_not_printable_ascii_are_dropped(value: str) -> None:
    context = received(SAMPLED, value, value)
    assert context is not None
    assert context.items() == [("traceparent", SAMPLED)]


def test_propagators_choose_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces.Propagation, "has_trace", False)
    context = received(SAMPLED, "a=1", "k=v")
    assert context is not None
    assert context.items() == [("baggage", "k=v")]
    monkeypatch.setattr(traces.Propagation, "has_baggage", False)
    assert received(SAMPLED, "a=1", "k=v") is None


def begun(sampler: Sampler, traceparent: str, *, begins_traces: bool = True) -> TraceContext | None:
    return Tracer(sampler, lambda _: None).begin(received(traceparent, "", ""), 0.0, begins_traces=begins_traces)


LOW, HIGH = "0" * 31 + "1", "f" * 32
"""Ids of traces that every ratio takes, and that none does but 1."""


@pytest.mark.parametrize(
    ("sampler", "given", "sent", "is_recorded"),
    [
        (Sampler(), SAMPLED, "01", True),
        (Sampler(), NOT_SAMPLED, "00", False),
        (Sampler(), f"00-{TRACE}-{CALLER}-03", "03", True),
        (Sampler(), f"00-{TRACE}-{CALLER}-02", "02", False),
        (Sampler(0.0), SAMPLED, "01", True),
        (Sampler(1.0, follows=False), NOT_SAMPLED, "01", True),
        (Sampler(0.0, follows=False), SAMPLED, "00", False),
        (Sampler(0.01, follows=False), f"00-{LOW}-{CALLER}-00", "01", True),
        (Sampler(0.01, follows=False), f"00-{HIGH}-{CALLER}-01", "00", False),
    ],
)
def test_the_flag_that_goes_on_is_what_was_decided(sampler: Sampler, given: str, sent: str, is_recorded: bool) -> None:
    context = begun(sampler, given)
    assert context is not None
    assert context.trace_id == given[3:35]
    assert context.traceparent[-2:] == sent
    assert (context.span is not None) == is_recorded
    if not is_recorded:
        assert context.traceparent[:53] == given[:53]


def test_a_request_without_a_context_begins_a_trace_at_the_edge_only() -> None:
    assert begun(Sampler(), "", begins_traces=False) is None
    assert begun(Sampler(0.0), "") is None
    first, second = begun(Sampler(), ""), begun(Sampler(), "")
    assert first is not None
    assert second is not None
    assert first.trace_id != second.trace_id
    assert first.span is not None
    assert (first.span.parent_id, first.traceparent[-3:]) == ("", "-01")


def test_a_share_of_traces_is_recorded_whose_ids_others_choose_too() -> None:
    """OpenTelemetry compares the last 64 bits of the id with the ratio."""
    sampler = Sampler(0.25)
    found = [context for _ in range(4000) if (context := begun(sampler, "")) is not None]
    assert 700 < len(found) < 1300
    assert all(int(context.trace_id[16:], 16) < 2**62 for context in found)
    assert any(int(context.trace_id[16:], 16) > 2**61 for context in found)


def test_links_beyond_the_limit_are_said_to_be_missing() -> None:
    tracer = Tracer(Sampler(), lambda _: None, max_links=2)
    members = [context for _ in range(3) if (context := tracer.begin(None, 0.0, begins_traces=True))]
    call = tracer.merged(members, "batch m", {}).span
    assert call is not None
    assert (len(call.links), call.attributes["splitserve.links.missing"]) == (2, 1)
    assert all(member.span is not None and member.span.links == [(call.trace_id, call.span_id)] for member in members)


def test_an_exporter_that_fails_is_counted() -> None:
    def fail(_: object) -> None:
        raise RuntimeError

    tracer = Tracer(Sampler(), fail)
    context = tracer.begin(None, 0.0, begins_traces=True)
    assert context is not None
    assert context.span is not None
    tracer.end(context.span)
    assert tracer.n_failures == 1
