"""Spans leave the process: a bounded queue, and a thread that hands them to OpenTelemetry's exporters.

The queue is our own, since OpenTelemetry's drops the oldest spans without counting them, and its shutdown waits for a collector
that does not answer. All of it is made in the process that serves, after any fork. ``OTEL_*`` variables configure it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitserve import __version__
from splitserve.telemetry.families import SPANS_DROPPED, SPANS_EXPORTED
from splitserve.telemetry.registry import Sample
from splitserve.telemetry.traces import MAX_LINKS, FinishedSpan, Propagation, Sampler, Tracer, Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_S = 2.0
"""How long the end of a process waits for spans to be exported."""

REPORT_INTERVAL_S = 60.0
"""Failures to export are logged at most once in this time."""

_EXPORTERS = ("otlp", "console", "none")
_PROTOCOLS = ("http/protobuf", "grpc")
_OTLP = "OTEL_EXPORTER_OTLP"

QUEUE_FULL, NOT_EXPORTED = "queue_full", "not_exported"


class SpanExport:
    """Exports spans until it is closed.

    Args:
        exporters: of OpenTelemetry, each of which gets all spans.
        resource: what the spans are of.
        max_queue: spans that wait; more are dropped.
        max_batch: spans that are exported at a time.
        delay_s: how long a span waits for others.
    """

    def __init__(
        self,
        exporters: Sequence[SpanExporter],
        resource: Resource,
        *,
        max_queue: int = 2048,
        max_batch: int = 512,
        delay_s: float = 5.0,
    ) -> None:
        self._exporters = exporters
        self._resource = resource
        self._max_queue = max_queue
        self._max_batch = max(1, min(max_batch, max_queue))
        self._delay_s = delay_s
        self._queue: deque[FinishedSpan] = deque()
        self._has_work = threading.Event()
        self._is_closing = False
        self._reported_at = -REPORT_INTERVAL_S
        self._n_unreported = 0
        self.tracer: Tracer | None = None
        self.n_exported = 0
        self.n_dropped = {QUEUE_FULL: 0, NOT_EXPORTED: 0}
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def put(self, span: FinishedSpan) -> None:
        """Export a span, later."""
        if len(self._queue) >= self._max_queue or self._is_closing:
            self.n_dropped[QUEUE_FULL] += 1
            return
        self._queue.append(span)
        if len(self._queue) >= self._max_batch and not self._has_work.is_set():
            self._has_work.set()

    async def close(self) -> None:
        """Export what is queued, for at most `FLUSH_S`; what is left then is dropped."""
        self._is_closing = True
        self._has_work.set()
        await asyncio.to_thread(self._thread.join, FLUSH_S)
        n_left = len(self._queue)
        self._queue.clear()
        if self._thread.is_alive():
            # A thread of its own, since some exporters wait for the collector here too; the process does not wait for it.
            threading.Thread(target=self._shut_down, daemon=True).start()
        else:
            self._shut_down()
        if n_left:
            self._drop(n_left, "the process ends")
        Tracing.tracer = None

    def _shut_down(self) -> None:
        for exporter in self._exporters:
            with contextlib.suppress(Exception):  # all spans are exported or counted by now
                exporter.shutdown()

    def _run(self) -> None:
        while not self._is_closing:
            self._has_work.wait(self._delay_s)
            self._has_work.clear()
            self._export_queued()
        self._export_queued()

    def _export_queued(self) -> None:
        """All that was queued when this began; what comes meanwhile forms the next batch, unless that is full."""
        n_left = len(self._queue)
        while n_left > 0 or len(self._queue) >= self._max_batch:
            batch: list[FinishedSpan] = []
            while self._queue and len(batch) < self._max_batch:
                batch.append(self._queue.popleft())
            if not batch:
                return
            n_left -= len(batch)
            self._export(batch)

    def _export(self, batch: Sequence[FinishedSpan]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        reason = ""
        try:
            spans = [readable(span, self._resource) for span in batch]
            results = [exporter.export(spans) for exporter in self._exporters]
            if any(result is not SpanExportResult.SUCCESS for result in results):
                reason = "the collector did not accept them"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:200]
        if reason:
            self._drop(len(batch), reason)
        else:
            self.n_exported += len(batch)

    def _drop(self, n: int, reason: str) -> None:
        import structlog

        self.n_dropped[NOT_EXPORTED] += n
        self._n_unreported += n
        if time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            # Requests are not affected. Logged at most once a minute.
            structlog.get_logger().warning("spans dropped", n=self._n_unreported, reason=reason)
            self._reported_at, self._n_unreported = time.monotonic(), 0

    # Implements `splitserve.server.metrics.Part`.

    async def refresh(self) -> None:
        """Nothing to wait for."""

    def collect(self) -> Iterator[Sample]:
        """Its samples."""
        yield Sample(SPANS_EXPORTED, (), self.n_exported)
        failures = {"not_made": self.tracer.n_failures} if self.tracer else {}
        for reason, n in {**self.n_dropped, **failures}.items():
            yield Sample(SPANS_DROPPED, (reason,), n)


def readable(finished: FinishedSpan, resource: Resource) -> ReadableSpan:
    """A span as OpenTelemetry's exporters take it."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

    span = finished.span
    trace_id, flags = int(span.trace_id, 16), TraceFlags(span.flags)
    state = TraceState.from_header([span.tracestate]) if span.tracestate else None
    parent = None
    if span.parent_id:
        parent = SpanContext(trace_id, int(span.parent_id, 16), span.is_remote, flags, state)
    return ReadableSpan(
        name=span.name,
        context=SpanContext(trace_id, int(span.span_id, 16), False, flags, state),
        parent=parent,
        resource=resource,
        attributes=dict(span.attributes),
        links=[
            Link(SpanContext(int(trace, 16), int(other, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)))
            for trace, other in tuple(span.links)
        ],
        kind=SpanKind[span.kind.upper()],
        status=Status(StatusCode.ERROR, finished.error) if finished.error else Status(),
        start_time=finished.start_ns,
        end_time=finished.end_ns,
        instrumentation_scope=InstrumentationScope("splitserve", __version__),
    )


def open_tracing(service: str, environment: Mapping[str, str] = os.environ) -> SpanExport | None:
    """Trace the requests of this process from now on, if the environment asks for it.

    Call it in the process that serves. A mistake in a variable is logged, and does not keep the process from serving.

    Args:
        service: its name, unless ``OTEL_SERVICE_NAME`` has another.
        environment: has the variables.
    """
    import structlog

    def value(name: str) -> str:
        return environment.get(name, "").strip()

    log = structlog.get_logger()
    wrong: list[str] = []
    is_disabled = value("OTEL_SDK_DISABLED").lower() == "true"
    _use_propagators(_names(value("OTEL_PROPAGATORS")), wrong)
    asked = [f"{_OTLP}_ENDPOINT", f"{_OTLP}_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"]
    if is_disabled or not any(map(value, asked)):
        _report(wrong)
        return None
    names = _names(value("OTEL_TRACES_EXPORTER")) or ["otlp"]
    wrong += [f"OTEL_TRACES_EXPORTER: {name[:32]} is not supported" for name in names if name not in _EXPORTERS]
    names = [name for name in names if name in _EXPORTERS and name != "none"]
    if not names:
        _report(wrong)
        return None
    sampler = _sampler(value("OTEL_TRACES_SAMPLER"), value("OTEL_TRACES_SAMPLER_ARG"), wrong)
    numbers = {
        name: _number(f"OTEL_{name}", value(f"OTEL_{name}"), default, wrong)
        for name, default in {
            "BSP_MAX_QUEUE_SIZE": 2048,
            "BSP_MAX_EXPORT_BATCH_SIZE": 512,
            "BSP_SCHEDULE_DELAY": 5000,
            "BSP_EXPORT_TIMEOUT": 30_000,
            "SPAN_LINK_COUNT_LIMIT": MAX_LINKS,
        }.items()
    }
    protocol = _protocol(environment, wrong)
    try:
        timeout_s = min(_timeout_s(environment, wrong), numbers["BSP_EXPORT_TIMEOUT"] / 1000)
        exporters = [_exporter(name, protocol, timeout_s) for name in names]
        resource = _resource(service, environment)
    except ImportError as error:
        # Traces are asked for, and their packages are not installed. The service serves without them.
        log.warning(
            "traces not supported",
            reason=f"{error}",
            see='pip install "splitserve[tracing]", or an image that was built with --build-arg EXTRAS=tracing',
        )
        return None
    except Exception as error:
        # An OTEL_* variable cannot be used. The service serves without traces.
        log.warning("traces not supported", reason=f"{type(error).__name__}: {error}"[:300])
        return None
    _report(wrong)
    export = SpanExport(
        exporters,
        resource,
        max_queue=numbers["BSP_MAX_QUEUE_SIZE"],
        max_batch=numbers["BSP_MAX_EXPORT_BATCH_SIZE"],
        delay_s=numbers["BSP_SCHEDULE_DELAY"] / 1000,
    )
    export.tracer = Tracing.tracer = Tracer(sampler, export.put, max_links=numbers["SPAN_LINK_COUNT_LIMIT"])
    # Requests are traced, as far as the sampler chooses them.
    log.info("tracing", exporters=names, protocol=protocol if "otlp" in names else "", sampled=sampler.ratio)
    return export


def _report(wrong: Iterable[str]) -> None:
    import structlog

    for reason in wrong:
        # Of an OTEL_* variable; its default counts instead.
        structlog.get_logger().warning("tracing variable ignored", reason=reason)


def _names(value: str) -> list[str]:
    return [name.strip().lower() for name in value.split(",") if name.strip()]


def _use_propagators(names: Sequence[str], wrong: list[str]) -> None:
    known = {"tracecontext", "baggage", "none"}
    wrong += [f"OTEL_PROPAGATORS: {name[:32]} is not supported" for name in names if name not in known]
    chosen = {name for name in names if name in known} or {"tracecontext", "baggage"}
    Propagation.has_trace = "tracecontext" in chosen
    Propagation.has_baggage = "baggage" in chosen


def _sampler(name: str, argument: str, wrong: list[str]) -> Sampler:
    name = (name or "parentbased_always_on").lower()
    kind = name.removeprefix("parentbased_")
    ratio = {"always_on": 1.0, "always_off": 0.0, "traceidratio": 1.0}.get(kind)
    if ratio is None:
        wrong.append(f"OTEL_TRACES_SAMPLER: {name[:32]} is not supported")
        return Sampler()
    if kind == "traceidratio" and argument:
        try:
            ratio = float(argument)
            if not 0 <= ratio <= 1:
                raise ValueError
        except ValueError:
            wrong.append(f"OTEL_TRACES_SAMPLER_ARG: expected a number from 0 to 1, got {argument[:32]}")
            ratio = 1.0
    return Sampler(ratio, follows=kind != name)


def _number(name: str, value: str, default: int, wrong: list[str]) -> int:
    if not value:
        return default
    if value.isascii() and value.isdecimal() and 0 < int(value) < 2**31:
        return int(value)
    wrong.append(f"{name}: expected a number of at least 1, got {value[:32]}")
    return default


def _protocol(environment: Mapping[str, str], wrong: list[str]) -> str:
    """The one that is named, else gRPC for its well-known port, else HTTP. Source: OpenTelemetry, "OTLP exporter"."""
    named = environment.get(f"{_OTLP}_TRACES_PROTOCOL") or environment.get(f"{_OTLP}_PROTOCOL") or ""
    if (named := named.strip().lower()) in _PROTOCOLS:
        return named
    if named:
        wrong.append(f"{_OTLP}_PROTOCOL: expected {' or '.join(_PROTOCOLS)}, got {named[:32]}")
    endpoint = environment.get(f"{_OTLP}_TRACES_ENDPOINT") or environment.get(f"{_OTLP}_ENDPOINT") or ""
    return "grpc" if endpoint.rstrip("/").endswith(":4317") else "http/protobuf"


def _timeout_s(environment: Mapping[str, str], wrong: list[str]) -> float:
    """In seconds, as OpenTelemetry's exporters for Python take it."""
    named = environment.get(f"{_OTLP}_TRACES_TIMEOUT") or environment.get(f"{_OTLP}_TIMEOUT") or "10"
    try:
        timeout_s = float(named)
        if not 0 < timeout_s < math.inf:
            raise ValueError
    except ValueError:
        wrong.append(f"{_OTLP}_TIMEOUT: expected a number of seconds, got {named[:32]}")
        return 10.0
    return timeout_s


def _exporter(name: str, protocol: str, timeout_s: float) -> SpanExporter:
    import logging

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # each retry would be a line; `_drop` says it once a minute
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    exporter: Any
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(timeout=timeout_s)
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        exporter = OverHttp(timeout=timeout_s)
    made: SpanExporter = exporter
    return made


def _resource(service: str, environment: Mapping[str, str]) -> Resource:
    import uuid

    from opentelemetry.sdk.resources import Resource

    attributes: dict[str, Any] = {
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
        "process.pid": os.getpid(),
    }
    given = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    is_named = environment.get("OTEL_SERVICE_NAME", "").strip() or any(
        pair.partition("=")[0].strip() == "service.name" for pair in given.split(",")
    )
    if not is_named:
        attributes |= {"service.name": f"splitserve-{service}", "service.namespace": "splitserve"}
    named = {key.strip() for key in (pair.partition("=")[0] for pair in given.split(","))}
    return Resource.create({key: each for key, each in attributes.items() if key not in named})
