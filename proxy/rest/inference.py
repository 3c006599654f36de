"""Inferences over REST, V2 and V1: their bodies, headers and compression on the one path of `splitserve.server.inference`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from proxy.rest import compression
from proxy.rest.routing import REQUEST_ID, request_id_of
from splitserve.errors import InvalidInput
from splitserve.oip import rest, v1
from splitserve.oip.messages import InferenceService, InferRequest, InferResponse, ModelMetadata
from splitserve.server.inference import Inference, InferenceRules
from splitserve.server.logs import log_request
from splitserve.telemetry import traces
from splitserve.telemetry.traces import Attribute, TraceContext, received
from splitserve.versions import Pair
from splitserve.wire.http1.messages import HttpRequest, HttpResponse, Respond

HEADER_LENGTH = b"inference-header-content-length"
TIMEOUT = b"request-timeout"
TRACEPARENT, TRACESTATE, BAGGAGE = traces.TRACEPARENT.encode(), traces.TRACESTATE.encode(), traces.BAGGAGE.encode()
_REQUEST_ID = REQUEST_ID.decode()
LONG_BODY_BYTES = 64 * 1024
"""Longer answers are compressed in a thread."""

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")


PathParts = dict[str, str]
"""The named parts of a request's path."""


class PairService(InferenceService, Protocol):
    """A service that binds requests to pairs."""

    def choose(self, model: str, version: str) -> tuple[Pair, ModelMetadata]:
        """See `proxy.service.ProxyService.choose`."""
        ...


class RestRules(InferenceRules, frozen=True, kw_only=True):
    """What is the same for every request: ``failure`` renders an error."""

    service: PairService
    max_body_bytes: int
    default_timeout_s: float
    max_timeout_s: float
    failure: Callable[[Exception], HttpResponse]
    scheme: str = "http"

    def timeout_s(self, incoming: HttpRequest) -> float:
        """The seconds that a request may take.

        Raises:
            InvalidInput: its header is not a positive number.
        """
        if TIMEOUT not in incoming.headers:
            return self.default_timeout_s
        value = incoming.headers[TIMEOUT].decode("latin-1")
        if not _SECONDS.fullmatch(value) or not float(value) > 0:
            raise InvalidInput(f"Request-Timeout: expected a number of seconds, more than 0, got {value[:32]!r}")
        return min(float(value), self.max_timeout_s)


def credentials(incoming: HttpRequest) -> Sequence[str]:
    """The value of the request's ``Authorization`` header, if it has one."""
    value = incoming.header(b"authorization")
    return [value] if value else []


async def receive(incoming: HttpRequest, encoding: str, max_bytes: int) -> bytes:
    """The whole body, decompressed.

    Args:
        incoming: the request.
        encoding: of its body; "" for none.
        max_bytes: of the body, compressed or not.

    Raises:
        InvalidInput: the body is not of that encoding.
        TooLarge, Overloaded: its size exceeds the limit of a body, or of the bytes in flight.
    """
    body = await incoming.body.read()
    if encoding and body:
        body = await asyncio.to_thread(compression.inflate, body, encoding, max_bytes=max_bytes)
        incoming.body.reserve(len(body))
    return body


def trace_of(incoming: HttpRequest) -> TraceContext | None:
    """The context in the headers of a request."""
    traceparent, tracestate, baggage = (incoming.header(name) or "" for name in (TRACEPARENT, TRACESTATE, BAGGAGE))
    return received(traceparent, tracestate, baggage)


def http_span(incoming: HttpRequest, route: str, http_status: int, scheme: str) -> tuple[str, dict[str, Attribute]]:
    """Name and attributes of the span of a request. Source: OpenTelemetry, "HTTP server span"."""
    address, port = server_in(incoming.header(b"host") or "")
    return f"{incoming.method} {route}", {
        "http.request.method": incoming.method,
        "http.route": route,
        "http.response.status_code": http_status,
        "url.path": incoming.path[:256],
        "url.scheme": scheme,
        "network.protocol.version": "1.1",
        "server.address": address,
        **({"server.port": port} if port else {}),
        **({"user_agent.original": agent[:256]} if (agent := incoming.header(b"user-agent")) else {}),
    }


def route_of(path: str, model: str) -> str:
    """The path without the names of model and version, of which there may be many."""
    api, _, rest_of_path = path.partition("/models/")
    action = rest_of_path.removeprefix(quote(model)).removeprefix(model)
    version, separator, verb = action.removeprefix("/versions/").rpartition(":" if ":" in action else "/")
    is_versioned = action.startswith("/versions/") and bool(version)
    return f"{api}/models/{{model}}{'/versions/{version}' if is_versioned else ''}{separator}{verb}"


def server_in(host: str) -> tuple[str, int]:
    """Name and port, 0 if there is none, in a Host header."""
    name, _, port = host.rpartition(":")
    return (name.strip("[]")[:256], int(port)) if name and port.isdecimal() and len(port) < 6 else (host[:256], 0)


class RestInference(Inference[HttpResponse]):
    """``POST /v2/models/MODEL[/versions/VERSION]/infer``.

    Args:
        rules: what is the same for every request.
        path: has ``model`` and ``version``.
        incoming: the request, whose body may not be complete yet.
        encoding: of the body; "" for none.
        respond: called with the answer.
        timeout_s: None: that of its header, or the default.

    Raises:
        InvalidInput: the header is not a positive number.
    """

    protocol = "rest"

    __slots__ = ("_body", "_encoding", "_incoming", "_respond", "_rest", "_told_id", "deadline")

    def __init__(
        self,
        rules: RestRules,
        path: PathParts,
        incoming: HttpRequest,
        encoding: str,
        respond: Respond,
        *,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(rules, path["model"], path["version"], is_received=incoming.body.is_complete and not encoding)
        self._rest = rules
        self._incoming = incoming
        self._encoding = encoding
        self._respond = respond
        self._body: bytes | None = None
        self._told_id = ""
        if timeout_s is None:
            timeout_s = rules.timeout_s(incoming) if TIMEOUT in incoming.headers else rules.default_timeout_s
        self.deadline = self._began + timeout_s

    def _credentials(self) -> Sequence[str]:
        return credentials(self._incoming)

    async def _receive(self) -> None:
        self._body = await receive(self._incoming, self._encoding, self._rest.max_body_bytes)

    def _decode(self) -> InferRequest:
        body, self._body = self._body, None
        headers = self._incoming.headers
        request = self.decode_body(self._incoming.body.content() if body is None else body)
        if REQUEST_ID in headers and not request.id and (named := request_id_of(self._incoming)):
            request = msgspec.structs.replace(request, id=named)
        if TRACEPARENT in headers or BAGGAGE in headers:
            request = msgspec.structs.replace(request, trace=trace_of(self._incoming))
        return self._with_id(request)

    def _given_trace(self) -> TraceContext | None:
        return trace_of(self._incoming)

    def _named_span(self, http_status: int) -> tuple[str, dict[str, Attribute]]:
        return http_span(self._incoming, route_of(self._incoming.path, self.model), http_status, self._rest.scheme)

    def decode_body(self, body: bytes) -> InferRequest:
        """The request in a decompressed body."""
        model, version, incoming = self.model, self.version, self._incoming
        header_length = _header_length(incoming) if HEADER_LENGTH in incoming.headers else None
        if header_length == 0:
            _, metadata = self._rest.service.choose(model, version)
            return rest.decode_raw_request(body, metadata, version, deadline=self.deadline, caller=incoming.peer)
        return rest.decode_request(
            model, version, body, header_length=header_length, deadline=self.deadline, caller=incoming.peer
        )

    def _encode(self, response: InferResponse) -> HttpResponse:
        assert self.request is not None, "an answer follows a request"
        return v2_response(response, self.request)

    def _deliver(self, answer: HttpResponse) -> None:
        if self.request is not None and self.request.log_id:
            answer.headers = (*answer.headers, (_REQUEST_ID, self.request.log_id))
        is_short = len(answer.body) < compression.MIN_COMPRESSED_BYTES
        self._respond(answer if is_short or not may_be_compressed(answer, self._incoming) else compressed(answer, self._incoming))

    def _fail(self, error: Exception) -> None:
        self._respond(self.failure(error))

    def failure(self, error: Exception) -> HttpResponse:
        """The response for an error of this request."""
        response = self._rest.failure(error)
        if self._told_id:
            response.headers += ((_REQUEST_ID, self._told_id),)
        return response

    def _given_id(self) -> str:
        return request_id_of(self._incoming) or ""

    def _tell_id(self, identity: str) -> None:
        self._told_id = identity


class V1Inference(RestInference):
    """``POST /v1/models/MODEL[/versions/VERSION]:predict``."""

    __slots__ = ("is_columnar",)

    def decode_body(self, body: bytes) -> InferRequest:
        # The version stays the caller's: it is bound to the same pair as here, and to another one if that is gone.
        _, metadata = self._rest.service.choose(self.model, self.version)
        decoded = v1.decode_request(body, metadata, self.version, deadline=self.deadline, caller=self._incoming.peer)
        self.is_columnar = decoded.is_columnar
        return decoded.request

    def _encode(self, response: InferResponse) -> HttpResponse:
        return v1_response(response, is_columnar=self.is_columnar)

    def _log(self, error: BaseException | None, facts: Mapping[str, object]) -> None:
        log_request("predict", self.model, self.version, self._began, error, facts)


def v2_response(response: InferResponse, request: InferRequest) -> HttpResponse:
    """The response to an inference, as the request asks for it."""
    body, header_length = rest.encode_response(response, request)
    if header_length is None:
        return HttpResponse(200, body)
    return HttpResponse(200, body, "application/octet-stream", ((HEADER_LENGTH.decode(), str(header_length)),))


def v1_response(response: InferResponse, *, is_columnar: bool) -> HttpResponse:
    """The response to an inference of the V1 protocol."""
    return HttpResponse(200, v1.encode_response(response, is_columnar=is_columnar))


def may_be_compressed(response: HttpResponse, incoming: HttpRequest) -> bool:
    """Whether it is worth asking `compressed`."""
    return len(response.body) >= compression.MIN_COMPRESSED_BYTES and b"accept-encoding" in incoming.headers


async def compressed(response: HttpResponse, incoming: HttpRequest) -> HttpResponse:
    """The response in an encoding that the client accepts, if there is one."""
    encoding = compression.choose(incoming.header(b"accept-encoding") or "")
    if not encoding:
        return response
    is_long = len(response.body) > LONG_BODY_BYTES
    deflate: Any = compression.deflate
    body = await asyncio.to_thread(deflate, response.body, encoding) if is_long else deflate(response.body, encoding)
    extra = (("content-encoding", encoding), ("vary", "accept-encoding"))
    return HttpResponse(response.status, body, response.content_type, (*response.headers, *extra))


def _header_length(incoming: HttpRequest) -> int:
    value = incoming.headers[HEADER_LENGTH].decode("latin-1")
    if not (value.isascii() and value.isdecimal() and len(value) < 12):
        raise InvalidInput(f"Inference-Header-Content-Length: expected a number of bytes, got {value[:32]!r}")
    return int(value)
