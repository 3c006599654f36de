"""A collector of traces for tests: receives OTLP over HTTP and gRPC on free ports, and keeps the spans."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")


class Received(NamedTuple):
    """A span as it arrived."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    resource: dict[str, Any]
    status: str
    start_ns: int
    end_ns: int

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])


class Collector:
    """Listens while entered. ``refuses``: answers each export with an error. ``hold``: exports wait while it is not set."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.n_exports = 0
        self.refuses = False
        self.hold = threading.Event()
        self.hold.set()
        self._changed = threading.Condition()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._pool = ThreadPoolExecutor(2)
        self._grpc = grpc.server(self._pool)
        pb_grpc.add_TraceServiceServicer_to_server(self._servicer(), self._grpc)
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def grpc_url(self) -> str:
        return f"http://127.0.0.1:{self._grpc_port}"

    def __enter__(self) -> Collector:
        self._thread.start()
        self._grpc.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hold.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._grpc.stop(0).wait()
        self._pool.shutdown()

    def wait_for(self, claim: Callable[[list[Received]], Any], what: str, patience_s: float = 60.0) -> list[Received]:
        """The spans, once they fulfil the claim."""
        with self._changed:
            assert self._changed.wait_for(lambda: claim(self.spans), patience_s), f"{what}: {summary(self.spans)}"
            return list(self.spans)

    def _receive(self, data: bytes) -> bool:
        self.hold.wait()
        with self._changed:
            self.n_exports += 1
            if not self.refuses:
                self.spans += spans_in(pb.ExportTraceServiceRequest.FromString(data))
            self._changed.notify_all()
            return not self.refuses

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                is_accepted = self.path == "/v1/traces" and collector._receive(data)
                self.send_response(200 if is_accepted else 400)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler

    def _servicer(self) -> Any:
        collector = self

        class Servicer(pb_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
                if not collector._receive(request.SerializeToString()):
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
                return pb.ExportTraceServiceResponse()

        return Servicer()


def spans_in(message: Any) -> list[Received]:
    return [
        Received(
            span.name,
            KINDS[span.kind],
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.trace_state,
            _attributes(span.attributes),
            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            _attributes(of.resource.attributes),
            span.status.message if span.status.code == 2 else "",
            span.start_time_unix_nano,
            span.end_time_unix_nano,
        )
        for of in message.resource_spans
        for scope in of.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def trees(spans: list[Received]) -> dict[str, list[Received]]:
    """Spans by trace."""
    found = defaultdict(list)
    for span in spans:
        found[span.trace_id].append(span)
    return dict(found)


def summary(spans: list[Received]) -> list[str]:
    return [
        f"{span.trace_id[:6]} {span.parent_id[:4] or '----'} > {span.span_id[:4]} {span.service} {span.name}"
        for span in spans[:60]
    ]
