"""HTTP/1.1 connections, on the parser httptools: one write for an answer, and limits on what a client may cost.

An answer's way through an ASGI server costs about as much as all that the proxy does for it; see docs/decisions/0012. The cases
that the limits are for are those of request smuggling and slow clients as servers have met them; see
tests/proxy/test_attacks_http.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Coroutine
from enum import Enum
from functools import lru_cache
from types import CoroutineType
from typing import Any, Final
from urllib.parse import unquote

import httptools
import msgspec
import structlog

from splitserve.batching.pending import Pending
from splitserve.wire.byte_budget import Share
from splitserve.wire.http1.listener import BODY_GRACE_S, LOOK_INTERVAL_S, Listener
from splitserve.wire.http1.messages import Incoming, Response

CHUNK_OVERHEAD_BYTES = 16
"""What the framing of a chunk may take on average; extensions of chunks mean nothing here."""

LINGER_S = 1.0
"""How long the rest of a body that nobody waits for is taken after the answer. Closing on it would cost the caller the answer.
Source: RFC 9112, section 9.6."""

_LONG_BODY_BYTES = 64 * 1024
"""Longer answers are not copied to stand behind their head."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_numbers = itertools.count()


class _Phase(Enum):
    IDLE = 0  # between requests
    HEAD = 1  # of a request that begins, or is waited for on a new connection
    BODY = 2
    WHOLE = 3  # a request that is being answered
    LINGER = 4  # it is answered, and the rest of its body is on its way
    CLOSING = 5


_IDLE, _HEAD, _BODY, _WHOLE, _LINGER, _CLOSING = _Phase  # to ask the class costs ten times as much, ten times a request


class _Rejected(Exception):
    """Raised where the parser calls: ends the parsing of a request that is refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class HttpConnection(asyncio.Protocol):
    """One connection. Requests that are sent before the one ahead is answered wait, and reading with them."""

    _transport: Any  # asyncio's or uvloop's, plain or TLS

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._limits: Final = listener.limits
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._caller = next(_numbers)
        self._phase = _HEAD
        self._since = self._now = self._loop.time()
        self._unsent, self._since_unsent = 0, 0.0
        self._is_write_paused = self._is_read_paused = False
        self._exchanges: deque[Incoming] = deque()
        self._under_way: Pending | None = None
        self._is_one_message = True
        self._is_deaf = False
        self._begin()

    def _begin(self) -> None:
        self._incoming = Incoming(self._caller, self._listener.max_body_bytes, Share(self._listener.budget))
        self._is_in_message = False
        self._n_raw_bytes = self._n_header_bytes = self._n_headers = self._n_chunks = 0

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = self._loop.time()

    # What the transport calls.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._listener.connections.add(self)
        if len(self._listener.connections) > self._limits.max_connections:
            self._refuse(503, f"more than {self._limits.max_connections} connections are open")

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.connections.leave(self)
        self._phase, self._is_deaf = _CLOSING, True
        self._forget_exchanges()
        self._give_up()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._now = self._loop.time()
        if self._phase is _IDLE:
            self._phase, self._since = _HEAD, self._now
        self._is_one_message = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # to what is not spoken here: the request is answered as it is, and is the last
            self._is_deaf = True
            for exchange in self._exchanges:
                exchange.keep_alive = exchange is not self._exchanges[-1]
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _Rejected):
                self._refuse(error.__context__.status, error.__context__.message)
            else:
                if error.__context__ is not None:  # a mistake of ours, where the parser called
                    structlog.get_logger().error("internal error", exc_info=error.__context__)
                self._refuse(400, "the request is not HTTP/1.1 as it should be")
            return
        if self._is_in_message and self._is_one_message:
            self._n_raw_bytes += len(data)
            self._check_framing()
        self._answer_next()

    def _check_framing(self) -> None:
        """All that is not body is bounded, parsed or not: httptools keeps what it has of a header until that ends."""
        bound = self._limits.max_header_bytes + self._limits.max_url_bytes + CHUNK_OVERHEAD_BYTES * self._n_chunks
        if self._n_raw_bytes - self._incoming.size > bound:
            if self._phase is _HEAD:
                self._refuse(431, f"the headers have more than {self._limits.max_header_bytes} bytes")
            else:
                self._refuse(400, "the chunks of the body have too much around them")

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._unsent = self._transport.get_write_buffer_size()
        self._since_unsent = self._loop.time()
        self._match_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._match_reading()
        self._answer_next()

    def _match_reading(self) -> None:
        """Read no further while requests wait for their turn, or answers for the client to take them."""
        is_full = self._is_write_paused or len(self._exchanges) > 1
        if is_full != self._is_read_paused and not self._transport.is_closing():
            self._is_read_paused = is_full
            if is_full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._is_in_message = True
        self._phase, self._since = _HEAD, self._now

    def on_url(self, url: bytes) -> None:
        incoming = self._incoming
        incoming.url += url
        if len(incoming.url) > self._limits.max_url_bytes:
            raise _Rejected(414, f"the URL has more than {self._limits.max_url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._n_headers += 1
        self._n_header_bytes += len(name) + len(value)
        limits = self._limits
        if self._n_headers > limits.max_headers:
            raise _Rejected(431, f"there are more than {limits.max_headers} headers")
        if self._n_header_bytes > limits.max_header_bytes:
            raise _Rejected(431, f"the headers have more than {limits.max_header_bytes} bytes")
        if self._phase is not _HEAD:  # a trailer: it means nothing here
            return
        name = name.lower()
        headers = self._incoming.headers
        headers[name] = b"%b, %b" % (headers[name], value) if name in headers else value

    def on_headers_complete(self) -> None:
        incoming, parser = self._incoming, self._parser
        headers = incoming.headers
        may_stay = parser.should_keep_alive()
        is_old = (b"connection" in headers or not may_stay) and parser.get_http_version() == "1.0"  # else it could not stay
        if b", " in headers.get(b"host", b"" if is_old else b", "):
            raise _Rejected(400, "expected one Host header")
        if b"transfer-encoding" in headers and (is_old or headers[b"transfer-encoding"].lower() != b"chunked"):
            raise _Rejected(400, "the only Transfer-Encoding that is taken is chunked")
        try:
            incoming.path = _path_of(incoming.url)
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            raise _Rejected(400, "the request's target is no URL") from None
        incoming.method = parser.get_method().decode("ascii")
        incoming.keep_alive = may_stay and not is_old
        if b"expect" in headers and headers[b"expect"].lower() == b"100-continue":
            incoming.invite = self._invite
        self._phase, self._since = _BODY, self._now
        self._put_in_turn(incoming)

    def on_chunk_header(self) -> None:
        self._n_chunks += 1
        if self._n_chunks > self._limits.max_chunks:
            raise _Rejected(413, f"the body has more than {self._limits.max_chunks} chunks")

    def on_body(self, body: bytes) -> None:
        if self._phase is not _LINGER:
            self._incoming.add(body)
            return
        self._incoming.size += len(body)
        if self._incoming.size > 2 * self._listener.max_body_bytes:
            self._close()

    def on_message_complete(self) -> None:
        self._is_one_message = False
        self._incoming.complete()
        if self._phase is _LINGER:
            self._close()
        elif self._phase is _BODY:
            self._phase = _WHOLE
        self._begin()

    # Answers.

    def _put_in_turn(self, incoming: Incoming) -> None:
        self._exchanges.append(incoming)
        if len(self._exchanges) > 1:
            self._match_reading()

    def _answer_next(self) -> None:
        """Begin with the request whose turn it is, and go on to those behind while they are answered at once."""
        while self._exchanges and self._under_way is None and not self._is_write_paused:
            incoming = self._exchanges[0]
            try:
                answer = incoming.refusal or self._listener.answer(incoming, self._reply)
            except Exception:
                answer = _internal_error()
            if isinstance(answer, Response):
                self._send(incoming, answer)
            elif isinstance(answer, CoroutineType):
                self._under_way = self._loop.create_task(self._serve(answer))
            else:
                self._under_way = answer  # type: ignore[assignment]  # CoroutineType is the only Coroutine here

    def _reply(self, answer: Response | Coroutine[Any, Any, Response]) -> None:
        """The answer to the request whose turn it is, which was pending."""
        if isinstance(answer, Response):
            self._under_way = None
            self._send(self._exchanges[0], answer)
            if self._exchanges:
                self._answer_next()
        else:
            self._under_way = self._loop.create_task(self._serve(answer))

    async def _serve(self, answer: Coroutine[Any, Any, Response]) -> None:
        try:
            response = await answer
        except asyncio.CancelledError:  # the caller left, or what it sends is refused
            return
        except Exception:
            response = _internal_error()
        self._reply(response)

    def _give_up(self) -> None:
        if self._under_way is not None:
            self._under_way.cancel()
            self._under_way = None

    def _invite(self) -> None:
        self._transport.write(_CONTINUE)

    def _send(self, incoming: Incoming, response: Response) -> None:
        self._exchanges.popleft()
        incoming.share.give_back()
        is_last = self._listener.is_closing or not (incoming.keep_alive and incoming.is_complete)
        body = response.body
        head = b"%b%d" % (self._listener.head(response.status, response.content_type), len(body))
        if response.headers:
            head += "".join([f"\r\n{name}: {value}" for name, value in response.headers]).encode()
        if is_last:
            head += b"\r\nconnection: close"
        if incoming.method == "HEAD":
            self._transport.write(head + b"\r\n\r\n")
        elif len(body) > _LONG_BODY_BYTES:
            self._transport.writelines((head, b"\r\n\r\n", body))
        else:
            self._transport.write(b"%b\r\n\r\n%b" % (head, body))
        if not is_last:
            self._go_on()
        elif incoming.is_complete or incoming.refusal is not None:
            self._close()
        else:
            self._enter(_LINGER)

    def _go_on(self) -> None:
        if self._phase is _WHOLE and not self._exchanges:
            self._phase = _IDLE
        self._since = self._loop.time()  # what came of a next request had to wait, and is not late
        if self._exchanges or self._is_read_paused:
            self._match_reading()

    def _close(self) -> None:
        self._enter(_CLOSING)
        self._is_deaf = True
        self._forget_exchanges()
        self._give_up()
        self._transport.close()

    def _forget_exchanges(self) -> None:
        for incoming in self._exchanges:
            incoming.share.give_back()
        self._exchanges.clear()

    # What takes too long, and what is refused without asking anyone.

    def look(self, now: float) -> None:
        """Refuse or close if the client takes longer than it may."""
        elapsed_s = now - self._since
        if self._is_write_paused:
            self._look_at_reader(now)
        elif self._phase is _CLOSING:
            if elapsed_s > self._limits.write_timeout_s:
                self._transport.abort()
        elif self._phase is _IDLE:
            if elapsed_s > self._limits.keep_alive_s:
                self._close_idle()
        elif self._phase is _LINGER:
            if elapsed_s > LINGER_S:
                self._close()
        elif self._is_read_paused:
            self._since = now
        elif self._phase is _HEAD and elapsed_s > self._limits.header_timeout_s and not self._exchanges:
            self._refuse(408, "the headers did not arrive in time")
        elif self._phase is _BODY and elapsed_s > BODY_GRACE_S and self._incoming.size < self._least_size(elapsed_s):
            self._refuse(408, f"the body arrives at less than {self._limits.min_body_bytes_per_s} bytes a second")

    def _least_size(self, elapsed_s: float) -> float:
        """Of a body that is on its way so long."""
        return self._limits.min_body_bytes_per_s * (elapsed_s - BODY_GRACE_S + LOOK_INTERVAL_S)

    def _look_at_reader(self, now: float) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent, self._since_unsent = unsent, now
        elif now - self._since_unsent > self._limits.write_timeout_s:
            self._transport.abort()

    def _close_idle(self) -> None:
        if self._transport.get_write_buffer_size():  # nobody has read the last answer: closing would wait for that
            self._transport.abort()
        else:
            self._close()

    def finish(self) -> None:
        """Close once what is under way is answered."""
        if not self._exchanges and not self._is_in_message:
            self._close()

    def abandon(self) -> None:
        """Close now."""
        self._transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Instead of the answer to the request that is on its way, which is the last."""
        self._is_deaf = True
        if self._phase is _LINGER:
            self._close()
            return
        incoming = self._incoming
        incoming.refusal = Response(status, msgspec.json.encode({"error": message}))
        if self._phase is not _BODY:
            self._put_in_turn(incoming)
        elif incoming is self._exchanges[0]:
            self._give_up()
        self._answer_next()


def _internal_error() -> Response:
    """In place of an answer; to be called where the error is handled."""
    structlog.get_logger().exception("internal error")
    return Response(500, b'{"error":"internal error","reason":"INTERNAL"}')


@lru_cache(1024)
def _path_of(url: bytes) -> str:
    """The path of a request's target, decoded."""
    path: str = httptools.parse_url(url).path.decode("ascii")
    return unquote(path) if "%" in path else path
