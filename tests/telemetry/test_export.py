"""Spans on their way to a collector: how the environment chooses it, and what happens if it is slow, away or silent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import structlog

from splitserve.telemetry import export
from splitserve.telemetry.export import SpanExport, open_tracing
from splitserve.telemetry.traces import Propagation, Tracer, Tracing
from tests.collector import Collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    Tracing.tracer, Propagation.has_trace, Propagation.has_baggage = None, True, True


@asynccontextmanager
async def opened(monkeypatch: pytest.MonkeyPatch, **variables: str) -> AsyncIterator[SpanExport]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spans = open_tracing("proxy")
    assert spans is not None
    try:
        yield spans
    finally:
        await spans.close()


def record(n: int = 1) -> None:
    tracer = Tracing.tracer
    assert isinstance(tracer, Tracer)
    for _ in range(n):
        context = tracer.begin(None, 0.0, begins_traces=True)
        assert context is not None
        assert context.span is not None
        context.span.name = "work"
        tracer.end(context.span)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_spans_arrive(collector: Collector, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """Also those that were recorded just before the end."""
    url = collector.grpc_url if protocol == "grpc" else collector.http_url
    async with opened(
        monkeypatch,
        OTEL_EXPORTER_OTLP_ENDPOINT=url,
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_RESOURCE_ATTRIBUTES="team=ml,service.version=7",
    ) as spans:
        record(3)
    assert len(collector.spans) == spans.n_exported == 3
    resource = collector.spans[0].resource
    assert (resource["service.name"], resource["team"], resource["service.version"]) == ("splitserve-proxy", "ml", "7")


async def test_a_service_is_named_as_configured(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_url, OTEL_SERVICE_NAME="mine"):
        record()
    assert collector.spans[0].service == "mine"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_TRACES_EXPORTER": "zipkin"},
    ],
)
def test_traces_are_off(variables: dict[str, str]) -> None:
    assert open_tracing("proxy", variables) is None
    assert Tracing.tracer is None


@pytest.mark.heavy  # starts a process
def test_services_without_the_variables_import_no_opentelemetry() -> None:
    code = (
        "import sys, proxy.__main__, jobs_service.__main__\n"
        "from splitserve.telemetry.export import open_tracing\n"
        "assert open_tracing('proxy', {}) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_without_the_packages_a_service_serves_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with structlog.testing.capture_logs() as log:
        assert open_tracing("proxy", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
    assert [line["event"] for line in log] == ["traces not supported"]
    assert "splitserve[tracing]" in log[0]["see"]


async def test_values_that_cannot_be_used_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with structlog.testing.capture_logs() as log:
        async with opened(
            monkeypatch,
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
            OTEL_EXPORTER_OTLP_PROTOCOL="thrift",
            OTEL_PROPAGATORS="b3",
            OTEL_TRACES_SAMPLER="traceidratio",
            OTEL_TRACES_SAMPLER_ARG="2",
            OTEL_BSP_SCHEDULE_DELAY="soon",
            OTEL_EXPORTER_OTLP_TIMEOUT="long",
        ):
            pass
    reasons = [line["reason"] for line in log if line["event"] == "tracing variable ignored"]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "OTEL_PROPAGATORS", "OTEL_TRACES_SAMPLER_ARG", "OTEL_BSP_SCHEDULE_DELAY", "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sampler", "argument", "ratio", "follows"),
    [
        ("", "", 1.0, True),
        ("always_on", "", 1.0, False),
        ("always_off", "", 0.0, False),
        ("traceidratio", "0.5", 0.5, False),
        ("parentbased_always_off", "", 0.0, True),
        ("parentbased_traceidratio", "0.01", 0.01, True),
        ("parentbased_traceidratio", "", 1.0, True),
        ("jaeger_remote", "", 1.0, True),
    ],
)
def test_samplers(sampler: str, argument: str, ratio: float, follows: bool) -> None:
    made = export._sampler(sampler, argument, [])
    assert (made.ratio, made.follows) == (ratio, follows)


def test_the_protocol_follows_the_port_unless_it_is_named() -> None:
    def protocol(**variables: str) -> str:
        return export._protocol(variables, [])

    assert protocol(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317") == "grpc"
    assert protocol(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4318") == "http/protobuf"
    assert protocol(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf") == "http/protobuf"


async def test_each_span_is_exported_or_counted(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst, while the collector is slow."""
    collector.hold.clear()
    async with opened(
        monkeypatch,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_url,
        OTEL_BSP_MAX_QUEUE_SIZE="100",
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10",
    ) as spans:
        record(10_000)
        assert spans.n_dropped[export.QUEUE_FULL] > 0
        collector.hold.set()
    assert spans.n_exported == len(collector.spans)
    assert spans.n_exported + sum(spans.n_dropped.values()) == 10_000
    assert {sample.labels: sample.value for sample in spans.collect()}[(export.QUEUE_FULL,)] == spans.n_dropped[export.QUEUE_FULL]


async def test_a_collector_that_is_away_is_said_once(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    collector.refuses = True
    with structlog.testing.capture_logs() as log:
        async with opened(
            monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_url, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1"
        ) as spans:
            record(3)
    assert collector.n_exports == 3
    assert spans.n_dropped[export.NOT_EXPORTED] == 3
    assert [line["event"] for line in log].count("spans dropped") == 1


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_collector_that_hangs_holds_no_shutdown(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """What it has not accepted by then is counted."""
    monkeypatch.setattr(export, "FLUSH_S", 0.2)
    collector.hold.clear()
    url = collector.grpc_url if protocol == "grpc" else collector.http_url
    async with asyncio.timeout(30):
        async with opened(
            monkeypatch,
            OTEL_EXPORTER_OTLP_ENDPOINT=url,
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="2",
        ) as spans:
            record(6)
        assert spans.n_exported == 0
        assert spans.n_dropped[export.NOT_EXPORTED] >= 4
    collector.hold.set()
    await asyncio.to_thread(spans._thread.join)
