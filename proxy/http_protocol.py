"""HTTP/1.1 connections with limits: uvicorn's protocol on httptools, which itself has none for what comes before the body.

Source of the cases: request smuggling and slow clients as servers have met them; see tests/test_attacks_http.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

CHUNK_OVERHEAD_BYTES = 16
"""What the framing of a chunk may take on average; extensions of chunks mean nothing here."""

BODY_GRACE_S = 5.0
"""How long a body may take before its rate is looked at."""

LOOK_INTERVAL_S = 1.0


class HttpLimits(msgspec.Struct, frozen=True):
    """What a connection may cost. Sizes are in bytes."""

    max_url_bytes: int = 8 * 1024
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_chunks: int = 65_536
    max_connections: int = 2_000
    header_timeout_s: float = 10.0
    min_body_bytes_per_s: int = 1_000
    keep_alive_s: float = 60.0
    write_timeout_s: float = 30.0


class _Rejected(Exception):
    """Ends the parsing of a request that has been refused."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        limits: of it and its fellows.
    """

    def __init__(self, *arguments: Any, limits: HttpLimits, **options: Any) -> None:
        self._limits = limits
        self._refusal: tuple[int, str] | None = None
        self._in_message = False
        self._in_headers = False
        self._is_whole_segment = True
        self._start_message()
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        super().__init__(*arguments, **options)
        self.timeout_keep_alive = limits.keep_alive_s  # type: ignore[assignment]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, f"more than {self._limits.max_connections} connections are open")
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._is_whole_segment = True
        super().data_received(data)
        self._await_the_rest()
        if self._in_message and self._is_whole_segment and not self.transport.is_closing():
            self._raw_bytes += len(data)
            self._check_framing()

    def _await_the_rest(self) -> None:
        """Timers for what did not come whole; most requests do, and need none."""
        is_stray = not self._in_message and self._is_whole_segment  # bytes between requests, which begin none
        if (self._in_headers or is_stray) and self._header_timer is None:
            self._await_headers()
        elif self._in_message and not self._in_headers and self._body_timer is None:
            self._body_timer = self.loop.call_later(BODY_GRACE_S, self._look_at_body)

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._on_header_timeout)

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(408, "the headers did not arrive in time")

    def _check_framing(self) -> None:
        """All that is not body is bounded, parsed or not: httptools keeps what it has of a header until that ends."""
        bound = self._limits.max_header_bytes + self._limits.max_url_bytes + CHUNK_OVERHEAD_BYTES * self._n_chunks
        if self._raw_bytes - self._body_bytes > bound:
            if self._in_headers:
                self._refuse(431, f"the headers have more than {self._limits.max_header_bytes} bytes")
            else:
                self._refuse(400, "the chunks of the body have too much around them")

    def _start_message(self) -> None:
        self._raw_bytes = self._body_bytes = self._header_bytes = self._n_headers = self._n_chunks = self._n_hosts = 0
        self._encodings: list[bytes] = []

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._in_message = self._in_headers = True
        self._start_message()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.max_url_bytes:
            self._reject(414, f"the URL has more than {self._limits.max_url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._n_headers += 1
        self._header_bytes += len(name) + len(value)
        if self._n_headers > self._limits.max_headers:
            self._reject(431, f"there are more than {self._limits.max_headers} headers")
        if self._header_bytes > self._limits.max_header_bytes:
            self._reject(431, f"the headers have more than {self._limits.max_header_bytes} bytes")
        if not self._in_headers:  # a trailer: it means nothing here
            return
        super().on_header(name, value)
        lowered = self.headers[-1][0]
        if lowered == b"host":
            self._n_hosts += 1
        elif lowered == b"transfer-encoding":
            self._encodings.append(value.lower())

    def on_headers_complete(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._in_headers = False
        is_old = self.parser.get_http_version() == "1.0"
        if self._n_hosts > 1 or (self._n_hosts == 0 and not is_old):
            self._reject(400, f"expected one Host header, got {self._n_hosts}")
        if self._encodings and (is_old or self._encodings != [b"chunked"]):
            self._reject(400, "the only Transfer-Encoding that is taken is chunked")
        super().on_headers_complete()
        self._body_started = self.loop.time()

    def on_chunk_header(self) -> None:
        self._n_chunks += 1
        if self._n_chunks > self._limits.max_chunks:
            self._reject(413, f"the body has more than {self._limits.max_chunks} chunks")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = self._is_whole_segment = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        super().on_message_complete()

    def _look_at_body(self) -> None:
        elapsed_s = self.loop.time() - self._body_started
        is_slow = self._body_bytes < self._limits.min_body_bytes_per_s * (elapsed_s - BODY_GRACE_S + LOOK_INTERVAL_S)
        if is_slow and not self.flow.read_paused:
            self._refuse(408, f"the body arrives at less than {self._limits.min_body_bytes_per_s} bytes a second")
            return
        self._body_timer = self.loop.call_later(LOOK_INTERVAL_S, self._look_at_body)

    # Slow readers.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._look_at_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _look_at_reader(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._look_at_reader)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # nobody has read the last answer: closing would wait for that
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # Refusals, which no application is asked about.

    def _reject(self, status: int, message: str) -> None:
        """From within a call of the parser, which passes on that there was an exception, and not which."""
        self._refusal = (status, message)
        raise _Rejected(message)

    def send_400_response(self, msg: str) -> None:
        status, message = self._refusal or (400, "the request is not HTTP/1.1 as it should be")
        self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = msgspec.json.encode({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
