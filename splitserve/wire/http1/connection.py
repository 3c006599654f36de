"""An HTTP/1.1 server connection on the parser httptools: one write for each response, and limits on what a client may cost.

A response's way through an ASGI server costs about as much as everything else that the proxy does for it; see
docs/decisions/0012. The limits answer known cases of request smuggling and slow clients; see tests/proxy/test_attacks_http.py.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Coroutine
from enum import Enum
from functools import lru_cache
from types import CoroutineType
from typing import Any, Final
from urllib.parse import unquote

import httptools
import structlog

from splitserve.wire.addresses import peer_address
from splitserve.wire.cancellable import Cancellable
from splitserve.wire.http1.listener import BODY_GRACE_S, TICK_INTERVAL_S, HttpListener
from splitserve.wire.http1.messages import HttpRequest, HttpResponse, RequestBody
from splitserve.wire.listening import FIRST_REQUEST_GRACE_S

CHUNK_OVERHEAD_BYTES = 16
"""Average limit on the framing of a chunk; chunk extensions are ignored."""

LINGER_TIMEOUT_S = 1.0
"""How long the rest of an unread body is discarded after the response. Closing at once would make the client lose the response.
Source: RFC 9112, section 9.6."""

_LARGE_BODY_BYTES = 64 * 1024
"""Larger response bodies are written without being copied after their head."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_connection_ids = itertools.count()


class _State(Enum):
    IDLE = 0  # between requests
    HEADERS = 1  # the headers of a request are arriving, or are awaited on a new connection
    BODY = 2  # its body is arriving
    COMPLETE = 3  # it has arrived and is being answered
    LINGER = 4  # it is answered, and the rest of its body is discarded
    CLOSING = 5


_IDLE, _HEADERS, _BODY, _COMPLETE, _LINGER, _CLOSING = _State  # reading them from the class costs ten times as much


class _Rejected(Exception):
    """Raised from a callback of the parser to stop parsing: the request gets this status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Http1Connection(asyncio.Protocol):
    """One connection. Pipelined requests are queued and answered in order; reading pauses while more than one is queued."""

    _transport: Any  # asyncio's or uvloop's, plain or TLS

    def __init__(self, listener: HttpListener) -> None:
        self._listener = listener
        self._limits: Final = listener.limits
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._id = next(_connection_ids)
        self._state = _HEADERS
        self._since = self._now = self._loop.time()
        """When the state was entered, and when data was received last."""
        self._n_unsent, self._unsent_since = 0, 0.0
        """Bytes in the transport's write buffer when it was seen to shrink last, and when that was."""
        self._is_write_paused = self._is_read_paused = False
        self._queue: deque[HttpRequest] = deque()
        """Requests whose headers are complete, in order; the first is being answered."""
        self._pending: Cancellable | None = None
        """What answers the first of the queue."""
        self._is_within_message = True
        """Whether the data received last holds no end of a message."""
        self._n_received = 0
        """Bytes of the data received last."""
        self._ignores_input = False
        self._address = self._read_address  # bound once
        self._start_message()

    def _start_message(self) -> None:
        """Expect a new message."""
        self._body = RequestBody(self._listener.max_body_bytes, self._listener.budget)
        self._request = HttpRequest(self._id, self._body, address=self._address)
        self._has_started = self._is_upgrade = False
        self._n_raw_bytes = self._n_headers = self._n_chunks = 0

    def _enter(self, state: _State) -> None:
        self._state = state
        self._since = self._loop.time()

    # Called by the transport.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        is_full = len(self._listener.connections) >= self._limits.max_connections and not self._listener.make_room()
        self._listener.connections.add(self)
        if is_full:
            self._reject(503, f"connection limit of {self._limits.max_connections} reached")

    def _read_address(self) -> str:
        return peer_address(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.connections.remove(self)
        self._state, self._ignores_input = _CLOSING, True
        self._clear_queue()
        self._cancel_pending()

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        self._now = self._loop.time()
        if self._state is _IDLE:
            self._state, self._since = _HEADERS, self._now
        self._is_within_message = True
        self._n_received = len(data)
        rest = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _Rejected):
                self._reject(error.__context__.status, error.__context__.message)
            else:
                if error.__context__ is not None:
                    # A bug: a callback of the parser or a handler failed unexpectedly. The client gets a 500.
                    structlog.get_logger().error("internal error", exc_info=error.__context__)
                self._reject(400, "malformed HTTP/1.1 request")
            return
        if rest is not None:
            self._decline_upgrade(rest)
            return
        if self._has_started and self._is_within_message:
            self._n_raw_bytes += self._n_received
            self._check_framing()
        self._process_queue()

    def _decline_upgrade(self, rest: bytes) -> None:
        """A request for another protocol is answered over HTTP/1.1. Source: RFC 9110, section 7.8.

        The parser has skipped the body of that request; another one reads it, and what follows.
        """
        if self._is_upgrade:
            self._is_upgrade = False
            self._parser = httptools.HttpRequestParser(_BodyFirst(self))
            self._parser.feed_data(_head_for_body(self._request.headers))
            self.data_received(rest)
            return
        self._ignores_input = True  # CONNECT: what follows has no form, and the request is the last
        for request in self._queue:
            request.keep_alive = request is not self._queue[-1]
        self._process_queue()

    def _check_framing(self) -> None:
        """Limit everything that is not body, parsed or not: httptools buffers a header until its end."""
        limit = self._limits.max_header_bytes + self._limits.max_url_bytes + CHUNK_OVERHEAD_BYTES * self._n_chunks
        if self._n_raw_bytes - self._body.n_bytes > limit:
            if self._state is _HEADERS:
                self._reject(431, f"request headers exceed {self._limits.max_header_bytes} bytes")
            else:
                self._reject(400, "chunk framing exceeds its limit")

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._n_unsent = self._transport.get_write_buffer_size()
        self._unsent_since = self._loop.time()
        self._update_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._update_reading()
        self._process_queue()

    def _update_reading(self) -> None:
        """Pause reading while requests are queued, or while the client does not read its responses."""
        should_pause = self._is_write_paused or len(self._queue) > 1
        if should_pause != self._is_read_paused and not self._transport.is_closing():
            self._is_read_paused = should_pause
            if should_pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._has_started = True
        self._state, self._since = _HEADERS, self._now

    def on_url(self, url: bytes) -> None:
        request = self._request
        request.target += url
        if len(request.target) > self._limits.max_url_bytes:
            raise _Rejected(414, f"request URL exceeds {self._limits.max_url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._n_headers += 1
        if self._n_headers > self._limits.max_headers:
            raise _Rejected(431, f"request has more than {self._limits.max_headers} headers")
        if self._state is not _HEADERS:  # trailers are ignored
            return
        name = name.lower()
        headers = self._request.headers
        headers[name] = b"%b, %b" % (headers[name], value) if name in headers else value

    def on_headers_complete(self) -> None:
        request, parser = self._request, self._parser
        headers = request.headers
        max_bytes = self._limits.max_header_bytes
        if self._n_raw_bytes + self._n_received > max_bytes and sum(map(len, [*headers, *headers.values()])) > max_bytes:
            raise _Rejected(431, f"request headers exceed {max_bytes} bytes")
        may_persist = parser.should_keep_alive()
        is_http_1_0 = (b"connection" in headers or not may_persist) and parser.get_http_version() == "1.0"
        if b", " in headers.get(b"host", b"" if is_http_1_0 else b", "):
            raise _Rejected(400, "expected one Host header")
        if b"transfer-encoding" in headers and (is_http_1_0 or headers[b"transfer-encoding"].lower() != b"chunked"):
            raise _Rejected(400, "Transfer-Encoding: only chunked is supported")
        try:
            request.path = _path_of(request.target)
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            raise _Rejected(400, "malformed request target") from None
        request.method = parser.get_method().decode("ascii")
        request.keep_alive = may_persist and not is_http_1_0
        if b"content-length" in headers:
            self._body.declared_length = headers[b"content-length"]
        if b"expect" in headers and headers[b"expect"].lower() == b"100-continue":
            self._body.send_continue = self._send_continue
        if b"upgrade" in headers:
            self._is_upgrade = parser.should_upgrade() and request.method != "CONNECT"
        self._state, self._since = _BODY, self._now
        self._enqueue(request)

    def on_chunk_header(self) -> None:
        self._n_chunks += 1
        if self._n_chunks > self._limits.max_chunks:
            raise _Rejected(413, f"request body has more than {self._limits.max_chunks} chunks")

    def on_body(self, body: bytes) -> None:
        if self._state is not _LINGER:
            self._body.feed(body)
            return
        self._body.n_bytes += len(body)
        if self._body.n_bytes > 2 * self._listener.max_body_bytes:
            self.close()

    def on_message_complete(self) -> None:
        if self._is_upgrade:  # the parser has skipped the body
            return
        self._is_within_message = False
        self._body.complete()
        if self._state is _LINGER:
            self.close()
        elif self._state is _BODY:
            self._state = _COMPLETE
        self._start_message()

    # Responses.

    def _enqueue(self, request: HttpRequest) -> None:
        self._queue.append(request)
        if len(self._queue) > 1:
            self._update_reading()

    def _process_queue(self) -> None:
        """Handle the first request, and the following ones as long as they are answered at once."""
        while self._queue and self._pending is None and not self._is_write_paused:
            request = self._queue[0]
            try:
                handled = request.rejection or self._listener.handler(request, self._respond)
            except Exception:
                handled = self._internal_error()
            if isinstance(handled, HttpResponse):
                self._send_response(request, handled)
            elif isinstance(handled, CoroutineType):
                self._pending = self._loop.create_task(self._run(handled))
            else:
                self._pending = handled  # type: ignore[assignment]  # CoroutineType is the only Coroutine here

    def _respond(self, response: HttpResponse | Coroutine[Any, Any, HttpResponse]) -> None:
        """The first request's response, which was pending."""
        if isinstance(response, HttpResponse):
            self._pending = None
            self._send_response(self._queue[0], response)
            if self._queue:
                self._process_queue()
        else:
            self._pending = self._loop.create_task(self._run(response))

    async def _run(self, handler: Coroutine[Any, Any, HttpResponse]) -> None:
        try:
            response = await handler
        except asyncio.CancelledError:  # the client left, or its request is rejected
            return
        except Exception:
            response = self._internal_error()
        self._respond(response)

    def _internal_error(self) -> HttpResponse:
        """The 500 for the exception being handled."""
        # A bug: a callback of the parser or a handler failed unexpectedly. The client gets a 500.
        structlog.get_logger().exception("internal error")
        return self._listener.error(500, "internal error")

    def _cancel_pending(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    def _send_continue(self) -> None:
        self._transport.write(_CONTINUE)

    def _send_response(self, request: HttpRequest, response: HttpResponse) -> None:
        self._queue.popleft()
        request.body.release()
        is_last = self._listener.is_draining or not (request.keep_alive and request.body.is_complete)
        body = response.body
        head = self._listener.head(response.status, response.content_type)
        more = "".join([f"\r\n{name}: {value}" for name, value in response.headers]).encode() if response.headers else b""
        if is_last:
            more += b"\r\nconnection: close"
        if request.method == "HEAD":
            self._transport.write(b"%b%d%b\r\n\r\n" % (head, len(body), more))
        elif len(body) > _LARGE_BODY_BYTES:
            self._transport.writelines((b"%b%d%b\r\n\r\n" % (head, len(body), more), body))
        else:
            self._transport.write(b"%b%d%b\r\n\r\n%b" % (head, len(body), more, body))
        if not is_last:
            if self._state is _COMPLETE and not self._queue:
                self._state = _IDLE
            self._since = self._loop.time()  # what has arrived of a next request had to wait: its time begins now
            if self._queue or self._is_read_paused:
                self._update_reading()
        elif request.body.is_complete or request.rejection is not None:
            self.close()
        else:
            self._enter(_LINGER)

    def close(self) -> None:
        """Cancel what is in flight, and close once what was sent is written."""
        self._enter(_CLOSING)
        self._ignores_input = True
        self._clear_queue()
        self._cancel_pending()
        self._transport.close()

    def _clear_queue(self) -> None:
        for request in self._queue:
            request.body.release()
        self._queue.clear()

    # Timeouts, draining, rejected requests.

    def tick(self, now: float) -> None:
        """Apply the timeouts."""
        elapsed_s = now - self._since
        if self._is_write_paused:
            self._check_write_progress(now)
        elif self._state is _CLOSING:
            if elapsed_s > self._limits.write_timeout_s:
                self._transport.abort()
        elif self._state is _IDLE:
            if elapsed_s > self._limits.keep_alive_s:
                self._close_idle()
        elif self._state is _LINGER:
            if elapsed_s > LINGER_TIMEOUT_S:
                self.close()
        elif self._is_read_paused:
            self._since = now
        elif self._listener.is_draining and self._state is _HEADERS and not self._has_started and not self._is_new(now):
            self.close()
        elif self._state is _HEADERS and elapsed_s > self._limits.header_timeout_s and not self._queue:
            self._reject(408, f"request headers did not arrive within {self._limits.header_timeout_s:g} s")
        elif self._state is _BODY and elapsed_s > BODY_GRACE_S and self._body.n_bytes < self._min_body_bytes(elapsed_s):
            self._reject(408, f"request body arrives at less than {self._limits.min_body_bytes_per_s} bytes/s")

    def waits_since(self) -> float:
        if self._is_write_paused:
            return self._unsent_since
        is_answering = bool(self._queue) and self._state is not _BODY
        return math.inf if is_answering or self._state is _CLOSING else self._since

    def _min_body_bytes(self, elapsed_s: float) -> float:
        """What has to have arrived of a body after ``elapsed_s``."""
        return self._limits.min_body_bytes_per_s * (elapsed_s - BODY_GRACE_S + TICK_INTERVAL_S)

    def _check_write_progress(self, now: float) -> None:
        n_unsent = self._transport.get_write_buffer_size()
        if n_unsent < self._n_unsent:
            self._n_unsent, self._unsent_since = n_unsent, now
        elif now - self._unsent_since > self._limits.write_timeout_s:
            self._transport.abort()

    def _close_idle(self) -> None:
        if self._transport.get_write_buffer_size():  # the last response was not read: closing would wait for that
            self._transport.abort()
        else:
            self.close()

    def drain(self) -> None:
        """Close once the requests in flight are answered, the first of a new connection included."""
        if not self._queue and not self._has_started and not self._is_new(self._loop.time()):
            self.close()

    def _is_new(self, now: float) -> bool:
        """Whether its first request may be on its way."""
        return self._state is _HEADERS and now - self._since < FIRST_REQUEST_GRACE_S

    def abort(self) -> None:
        """Close at once."""
        self._state, self._ignores_input = _CLOSING, True
        self._transport.abort()

    def _reject(self, status: int, message: str) -> None:
        """Answer the request that is arriving with an error, and close."""
        self._ignores_input = True
        if self._state is _LINGER:
            self.close()
            return
        request = self._request
        request.rejection = self._listener.error(status, message)
        if self._state is not _BODY:
            self._enqueue(request)
        elif request is self._queue[0]:
            self._cancel_pending()
        self._process_queue()


class _BodyFirst:
    """Passes on what a parser finds, except the head of its first message."""

    def __init__(self, connection: Http1Connection) -> None:
        self._connection = connection
        self._is_first_head = True
        self.on_body = connection.on_body
        self.on_chunk_header = connection.on_chunk_header
        self.on_message_complete = connection.on_message_complete

    def on_message_begin(self) -> None:
        if not self._is_first_head:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_first_head:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_first_head:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._is_first_head:
            self._connection.on_headers_complete()
        self._is_first_head = False


def _head_for_body(headers: dict[bytes, bytes]) -> bytes:
    """The head of a request whose body is framed as these headers say. They were valid."""
    framing = b""
    if b"transfer-encoding" in headers:
        framing = b"transfer-encoding: chunked\r\n"
    elif b"content-length" in headers:
        framing = b"content-length: %b\r\n" % headers[b"content-length"]
    return b"POST / HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n"


@lru_cache(1024)
def _path_of(target: bytes) -> str:
    """The path of a request target, percent-decoded."""
    path: str = httptools.parse_url(target).path.decode("ascii")
    return unquote(path) if "%" in path else path
