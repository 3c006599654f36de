"""Traces: the context that travels with a request as one of its fields, and the spans that this process records of it.

Nothing here imports OpenTelemetry: what is recorded becomes its objects in the thread that exports it
(`splitserve.telemetry.export`). A request that is not sampled has no span.

1. A face reads the context of a request from its headers (`received`), and lets the `Tracer`, if there is one, begin a span.
2. The context goes on with `InferRequest.trace`, over queues, threads and both hops; without a tracer unchanged.
3. A merged call has a trace of its own, with links to the spans of its requests, and these have a link to it (`merged`).

Source: W3C Trace Context 2, W3C Baggage; OpenTelemetry, "Sampling".
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import msgspec

TRACEPARENT, TRACESTATE, BAGGAGE = "traceparent", "tracestate", "baggage"
FIELDS = (TRACEPARENT, TRACESTATE, BAGGAGE)
"""Headers, metadata of gRPC, and the parameters of a message that has none."""

MAX_STATE_LENGTH, MAX_STATE_MEMBERS, LONG_STATE_MEMBER = 512, 32, 128
"""Of ``tracestate``: beyond these, members are left out, first those that are longer than the last. Source: W3C Trace Context,
"tracestate Limits"."""

MAX_BAGGAGE_LENGTH, MAX_BAGGAGE_MEMBERS = 8192, 64
"""Of ``baggage``: members beyond these are left out. Source: W3C Baggage, "Limits"."""

MAX_LINKS = 4096
"""Of a span: as many as a call can have requests. ``OTEL_SPAN_LINK_COUNT_LIMIT`` replaces it."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1

Attribute = str | int | float | bool
Kind = Literal["internal", "server", "client", "consumer"]
Link = tuple[str, str]
"""Trace and span."""

FAILURES_OF_SERVERS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that are an error of a server; any code is one of a client. Source: OpenTelemetry, "gRPC", "Span status"."""


class Span(msgspec.Struct, eq=False):
    """Work of this process for a request, which is recorded. ``began`` is on the monotonic clock."""

    kind: Kind
    trace_id: str
    span_id: str
    parent_id: str
    """"" for the first of its trace."""

    is_remote: bool
    """Whether the parent is in another process."""

    tracestate: str
    flags: int
    began: float
    name: str = ""
    attributes: dict[str, Attribute] = {}
    links: list[Link] = []


class FinishedSpan(msgspec.Struct, frozen=True):
    """A span to export. Times are nanoseconds since the epoch; ``error``: code of the failure, or ""."""

    span: Span
    start_ns: int
    end_ns: int
    error: str


class TraceContext(msgspec.Struct, frozen=True, eq=False):
    """What goes on with a request, as headers: ``traceparent`` "" means that there is only baggage.

    ``span``: the span of this process that what follows belongs to, if one is recorded.
    """

    traceparent: str
    tracestate: str = ""
    baggage: str = ""
    span: Span | None = None

    def __copy__(self) -> TraceContext:
        return self

    @property
    def trace_id(self) -> str:
        """The id of the trace; "" without one."""
        return self.traceparent[3:35]

    def items(self) -> list[tuple[str, str]]:
        """Names and values to send on."""
        named = ((TRACEPARENT, self.traceparent), (TRACESTATE, self.tracestate), (BAGGAGE, self.baggage))
        return [(name, value) for name, value in named if value]


class Propagation:
    """Which contexts are read and sent on. Set from ``OTEL_PROPAGATORS``."""

    has_trace: ClassVar[bool] = True
    has_baggage: ClassVar[bool] = True


def received(traceparent: str, tracestate: str, baggage: str) -> TraceContext | None:
    """The context in the headers of a request, "" for those that it does not have; None: there is none, or it is invalid."""
    if not Propagation.has_trace or not parsed(traceparent):
        traceparent = tracestate = ""
    if not Propagation.has_baggage:
        baggage = ""
    if tracestate:
        tracestate = _bounded_state(tracestate)
    if baggage:
        baggage = _bounded_baggage(baggage)
    return TraceContext(traceparent, tracestate, baggage) if traceparent or baggage else None


def received_in(headers: Mapping[str, object] | Iterable[tuple[str, str]]) -> TraceContext | None:
    """As `received`, of all headers, names in lower case. Two headers of a name are joined, which no ``traceparent`` can be."""
    found: dict[str, str] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        if name in FIELDS and isinstance(value, str):
            found[name] = f"{found[name]},{value}" if name in found else value
    return received(found.get(TRACEPARENT, ""), found.get(TRACESTATE, ""), found.get(BAGGAGE, "")) if found else None


def parsed(traceparent: str) -> tuple[str, str, int] | None:
    """Trace, span and flags; None: it is invalid. A later version may be longer."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return trace_id, span_id, int(flags, 16)


def _bounded_state(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        return ""
    if len(value) <= MAX_STATE_LENGTH and value.count(",") < MAX_STATE_MEMBERS:
        return value
    members = [member for each in value.split(",") if (member := each.strip())]
    if len(value) > MAX_STATE_LENGTH:
        members = [member for member in members if len(member) <= LONG_STATE_MEMBER]
    return _first(members, MAX_STATE_MEMBERS, MAX_STATE_LENGTH)


def _bounded_baggage(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        return ""
    if len(value) <= MAX_BAGGAGE_LENGTH and value.count(",") < MAX_BAGGAGE_MEMBERS:
        return value
    return _first(value.split(","), MAX_BAGGAGE_MEMBERS, MAX_BAGGAGE_LENGTH)


def _first(members: Sequence[str], n: int, max_length: int) -> str:
    """As many members as fit, joined."""
    length, kept = -1, []
    for member in members[:n]:
        length += 1 + len(member)
        if length > max_length:
            break
        kept.append(member)
    return ",".join(kept)


class Sampler(msgspec.Struct, frozen=True):
    """Decides from the bytes of a header.

    ``ratio`` of traces is recorded; ``follows``: where the caller has decided, that counts instead.
    """

    ratio: float = 1.0
    follows: bool = True

    @property
    def bound(self) -> int:
        """The last 64 bits of the ids of traces that are recorded are below. Source: OpenTelemetry, "TraceIdRatioBased"."""
        return round(self.ratio * 2**64)


class Tracer:
    """Makes the spans of a process.

    Args:
        sampler: decides which.
        export: takes spans that have ended. It must not wait.
        max_links: of a span.
    """

    def __init__(self, sampler: Sampler, export: Callable[[FinishedSpan], None], *, max_links: int = MAX_LINKS) -> None:
        self._follows = sampler.follows
        self._bound = sampler.bound
        self._export = export
        self._max_links = max_links
        self.n_failures = 0
        """Spans that could not be made."""

    def begin(self, context: TraceContext | None, began: float, *, begins_traces: bool) -> TraceContext | None:
        """The context of what follows from a request: with a span if it is recorded.

        Args:
            context: that it came with.
            began: when, on the monotonic clock.
            begins_traces: whether a request without a context can begin a trace here: not if another stage has decided already.
        """
        if context is None or not context.traceparent:
            if not begins_traces or random.getrandbits(64) >= self._bound:
                return context
            # Part of the id decides, so that others who sample by it decide alike.
            trace_id = f"{_random(8)}{_below(self._bound):016x}"
            return self._open("server", trace_id, "", 1, "", context.baggage if context else "", began, is_remote=False)
        traceparent = context.traceparent  # checked when it was received
        flags = int(traceparent[53:55], 16)
        if self._follows and not flags & _SAMPLED:
            return context
        trace_id, parent_id = traceparent[3:35], traceparent[36:52]
        is_recorded = self._follows or int(trace_id[16:], 16) < self._bound
        if is_recorded:
            flags |= _SAMPLED
            return self._open("server", trace_id, parent_id, flags, context.tracestate, context.baggage, began, is_remote=True)
        if flags & _SAMPLED:  # what goes on says what was decided
            return msgspec.structs.replace(context, traceparent=f"00-{trace_id}-{parent_id}-{flags & ~_SAMPLED:02x}")
        return context

    def child(self, parent: TraceContext, kind: Kind, name: str, attributes: Mapping[str, Attribute]) -> TraceContext:
        """The context of a part of the work of a span of this process. ``parent`` has one."""
        above = parent.span
        assert above is not None, "a part belongs to a span"
        context = self._open(
            kind, above.trace_id, above.span_id, above.flags, parent.tracestate, parent.baggage, time.monotonic(), is_remote=False
        )
        assert context.span is not None
        context.span.name, context.span.attributes = name, dict(attributes)
        return context

    def continued(self, sent: TraceContext, kind: Kind, name: str, attributes: Mapping[str, Attribute]) -> TraceContext | None:
        """As `begin`, for work that was asked for before; None: it is not recorded."""
        context = self.begin(sent, time.monotonic(), begins_traces=False)
        if context is None or context.span is None:
            return None
        context.span.kind, context.span.name, context.span.attributes = kind, name, dict(attributes)
        return context

    def merged(self, contexts: Sequence[TraceContext], name: str, attributes: Mapping[str, Attribute]) -> TraceContext:
        """The context of a call for several requests, some of which are recorded: a trace of its own, linked both ways.

        Args:
            contexts: of those that are recorded.
            name: of the call.
            attributes: of the call, and of the requests.
        """
        context = self._open("internal", _random(16), "", 1, "", "", time.monotonic(), is_remote=False)
        call = context.span
        assert call is not None
        call.name, call.attributes = name, dict(attributes)
        for each in contexts:
            member = each.span
            assert member is not None, "requests that are recorded have spans"
            if len(call.links) < self._max_links:
                call.links.append((member.trace_id, member.span_id))
            member.links.append((call.trace_id, call.span_id))
            member.attributes.update(attributes)
        if len(contexts) > len(call.links):
            call.attributes["splitserve.links.missing"] = len(contexts) - len(call.links)
        return context

    def end(self, span: Span, code: str = "OK") -> None:
        """Export a span that has ended now.

        Args:
            span: begun by this tracer.
            code: of gRPC.
        """
        try:
            if "rpc.system.name" in span.attributes:
                span.attributes["rpc.response.status_code"] = code
            http_status = span.attributes.get("http.response.status_code")
            failed = code != "OK" and (code in FAILURES_OF_SERVERS or span.kind != "server")
            if isinstance(http_status, int):
                failed = http_status >= 500
            error = "" if not failed else code if code != "OK" else str(http_status)
            if error:
                span.attributes["error.type"] = error
            end_ns = time.time_ns()
            duration_ns = int((time.monotonic() - span.began) * 1e9)
            self._export(FinishedSpan(span, end_ns - duration_ns, end_ns, error))
        except Exception:
            self.n_failures += 1

    @contextmanager
    def ending(self, context: TraceContext) -> Iterator[None]:
        """End the span of a context with the block, with the code of the error that it raises."""
        assert context.span is not None, "only what is recorded ends"
        try:
            yield
        except BaseException as error:
            self.end(context.span, code_of(error))
            raise
        self.end(context.span)

    def _open(
        self,
        kind: Kind,
        trace_id: str,
        parent_id: str,
        flags: int,
        tracestate: str,
        baggage: str,
        began: float,
        *,
        is_remote: bool,
    ) -> TraceContext:
        span = Span(kind, trace_id, _random(8), parent_id, is_remote, tracestate, flags, began)
        return TraceContext(f"00-{trace_id}-{span.span_id}-{flags:02x}", tracestate, baggage, span)


class Tracing:
    """The tracer of this process; None: traces are off, and contexts are passed on."""

    tracer: ClassVar[Tracer | None] = None


def merged(contexts: Sequence[TraceContext], model: str, n_requests: int, n_rows: int) -> TraceContext | None:
    """The context of a call for several requests.

    One that is recorded has a trace of its own. Otherwise the call goes on with the context of its only request that has one: a
    call cannot be part of several.

    Args:
        contexts: of those requests that have one; at least one.
        model: that is called.
        n_requests: in the call.
        n_rows: in the call.
    """
    recorded = [context for context in contexts if context.span is not None]
    if (tracer := Tracing.tracer) is not None and recorded:
        attributes: dict[str, Attribute] = {
            "splitserve.model": model,
            "splitserve.batch.requests": n_requests,
            "splitserve.batch.rows": n_rows,
        }
        return tracer.merged(recorded, f"batch {model}", attributes)
    return contexts[0] if len(contexts) == 1 else None


@contextmanager
def submitting(
    given: TraceContext | None, name: str, attributes: Mapping[str, Attribute], *, done: int = 202
) -> Iterator[TraceContext | None]:
    """The context that goes on with what is submitted in the block, whose span ends with the block.

    Args:
        given: in the headers of the request.
        name: of the span.
        attributes: of the span; those of HTTP get the status.
        done: the status of HTTP, unless the block raises.
    """
    tracer = Tracing.tracer
    context = given if tracer is None else tracer.begin(given, time.monotonic(), begins_traces=True)
    if tracer is None or context is None or (span := context.span) is None:
        yield context
        return
    span.name, span.attributes = name, dict(attributes)
    is_http = "http.request.method" in attributes
    with tracer.ending(context):
        try:
            yield context
        except Exception as error:
            if is_http:
                span.attributes["http.response.status_code"] = getattr(error, "http_status", 500)
            raise
        if is_http:
            span.attributes["http.response.status_code"] = done


def code_of(error: BaseException) -> str:
    """The code of gRPC, of an error as other rooms raise it."""
    code = getattr(error, "grpc_code", None)
    return code if isinstance(code, str) else "INTERNAL" if isinstance(error, Exception) else "CANCELLED"


def _random(n_bytes: int) -> str:
    """Of an id, which is never all zeros."""
    while not (drawn := os.urandom(n_bytes)).strip(b"\0"):
        pass
    return drawn.hex()


def _below(bound: int) -> int:
    return int.from_bytes(os.urandom(16)) % max(1, bound)
