"""A gRPC server on our own HTTP/2 connections: no threads, and no task for a call but that of its handler.

See docs/decisions/0017.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from splitserve.wire.grpc.call import CallConnection, CallReservation, MethodHandler, ServerCall
from splitserve.wire.grpc.messages import CallError
from splitserve.wire.grpc.request import RequestHeaders, parse_request_headers
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import TICK_INTERVAL_S
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.frames import PREFACE
from splitserve.wire.http2.headers import HeaderDecoder, HeaderListTooLarge
from splitserve.wire.listening import CLOSE_GRACE_S, FIRST_REQUEST_GRACE_S, HANDSHAKE_TIMEOUT_S, Acceptor, Connections

AGE_JITTER = 0.1
"""Connections that were opened together reach their maximum age at different times. Source: gRPC proposal A9."""

DRAIN_PING_TIMEOUT_S = 5.0
"""A client that does not acknowledge the PING after a GOAWAY within this time is considered gone, and draining continues."""

_MAX_SKIPPED_IDS = 100
"""Ranges of stream ids that a client skipped and that are remembered, to distinguish them from closed ones."""


class ServerLimits(msgspec.Struct, frozen=True):
    """Limits on clients. Sizes are in bytes; ages, keepalive and idle time mean what they mean in grpc-core."""

    max_message_bytes: int = 64 * 1024 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_streams: int = 1024
    max_connections: int = 2_000
    keepalive_time_s: float = 7200.0
    keepalive_timeout_s: float = 20.0
    max_connection_age_s: float = math.inf
    max_connection_age_grace_s: float = math.inf
    max_connection_idle_s: float = math.inf

    @property
    def tick_interval_s(self) -> float:
        """At most half of the shortest timeout."""
        shortest_s = min(self.keepalive_time_s, self.keepalive_timeout_s, self.max_connection_age_s, self.max_connection_idle_s)
        return min(TICK_INTERVAL_S, shortest_s / 2)


_connection_ids = itertools.count()
_NO_METHOD = MethodHandler()


class GrpcServerConnection(CallConnection):
    """One client's connection."""

    def __init__(self, server: GrpcServer) -> None:
        limits = server.limits
        super().__init__(keepalive_time_s=limits.keepalive_time_s, keepalive_timeout_s=limits.keepalive_timeout_s)
        self._server = server
        self._limits = limits
        self.max_message_bytes = limits.max_message_bytes
        self.new_reservation = server.new_reservation
        self.peer = f"grpc:{next(_connection_ids)}"
        self._headers: HeaderDecoder[RequestHeaders] = HeaderDecoder(parse_request_headers, limits.max_metadata_bytes)
        self._preface: bytes | None = b""
        """What has arrived of the client's preface; None: all of it."""
        self._skipped_ids: list[range] = []
        """Stream ids that the client did not use, and cannot use any more."""
        self._max_accepted_id = frames.MAX_STREAM_ID
        """Streams above it are ignored; lowered by the final GOAWAY."""
        self._opened_at = self.now()
        jitter = random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)  # noqa: S311
        self._drain_at = self._opened_at + limits.max_connection_age_s * jitter
        self._is_draining = self._is_client_silent = False
        self._closing_ping_at = 0.0
        """When the PING was sent whose acknowledgement says that the client has received the last answer; 0: not yet."""
        self._draining_since = 0.0
        self._idle_since = self._opened_at
        self._id_at_tick = 0
        """The last stream id at the last tick."""

    def status_of(self, error: Exception) -> CallError:
        return error if isinstance(error, CallError) else self._server.status_of(error)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)
        if len(self._server.connections) > self._limits.max_connections:
            self.abort()
            return
        settings = {
            frames.MAX_CONCURRENT_STREAMS: self._limits.max_streams,
            frames.MAX_HEADER_LIST_SIZE: self._limits.max_metadata_bytes,
        }
        self._send_preface(b"", settings)

    def data_received(self, data: bytes) -> None:
        if self._preface is not None:
            self._preface += data
            if not PREFACE.startswith(self._preface[: len(PREFACE)]):
                self.close(frames.PROTOCOL_ERROR, "expected the HTTP/2 connection preface")
                return
            if len(self._preface) < len(PREFACE):
                return
            data, self._preface = self._preface[len(PREFACE) :], None
        super().data_received(data)

    def _settings_acknowledged(self) -> None:
        self._headers.disable_dynamic_table()

    def _is_idle(self, stream_id: int) -> bool:
        return not stream_id & 1 or stream_id > self._last_stream_id

    def _headers_received(self, stream_id: int, block: bytes, end_stream: bool) -> None:
        request: RequestHeaders | None
        try:
            request = self._headers.decode(block)
        except HeaderListTooLarge:
            request = None
        call = self._streams.get(stream_id)
        if call is not None:
            self._trailers_received(call, request, end_stream)
        elif not stream_id & 1:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "HEADERS on a stream id of the server's")
        elif stream_id <= self._last_stream_id:
            if any(stream_id in skipped for skipped in self._skipped_ids):
                raise Http2ConnectionError(frames.PROTOCOL_ERROR, "stream id lower than an earlier one")
            self._frame_on_closed_stream(stream_id)
        else:
            self._open_stream(stream_id, request, end_stream)

    def _open_stream(self, stream_id: int, request: RequestHeaders | None, end_stream: bool) -> None:
        if stream_id > self._last_stream_id + 2:
            self._skipped_ids = [*self._skipped_ids[-_MAX_SKIPPED_IDS:], range(self._last_stream_id + 1, stream_id)]
        if stream_id > self._max_accepted_id:  # the client has been told that it is not processed. Source: RFC 9113, section 6.8
            self._last_stream_id = stream_id
            self._remember_reset(stream_id, by_us=True)
            return
        self._last_stream_id = stream_id
        if len(self._streams) >= self._limits.max_streams:
            self._stream_error(stream_id, frames.REFUSED_STREAM, "")
        elif request is not None and (request.is_malformed or (end_stream and request.content_length > 0)):
            self._stream_error(stream_id, frames.PROTOCOL_ERROR, "")
        else:
            self._begin_call(stream_id, request, end_stream)

    def _begin_call(self, stream_id: int, request: RequestHeaders | None, end_stream: bool) -> None:
        if request is None:
            rejection = CallError("RESOURCE_EXHAUSTED", f"metadata exceeds {self._limits.max_metadata_bytes} bytes")
            request = RequestHeaders("", None, b"", (), rejection)
        handler = self._server.handlers.get(request.path)
        call = ServerCall(self, stream_id, self._initial_send_window, request, handler or _NO_METHOD)
        call.remote_closed = end_stream
        self._streams[stream_id] = call
        if request.rejection is not None:
            if request.http_status == 200:
                call.fail(request.rejection)
            else:
                call.reject(request.http_status, request.rejection)
        elif handler is None:
            call.fail(CallError("UNIMPLEMENTED", "unknown method"))
        elif request.timeout_s == 0:
            call.fail(CallError("DEADLINE_EXCEEDED", "deadline exceeded before the call began"))
        else:
            call.start()
            if end_stream:
                self._data_received(call, b"", True)

    def _trailers_received(self, call: ServerCall, trailers: RequestHeaders | None, end_stream: bool) -> None:
        """A second header block. Source: RFC 9113, sections 5.1 and 8.1."""
        if call.remote_closed:
            self._stream_error(call.stream_id, frames.STREAM_CLOSED, "HEADERS after END_STREAM")
        elif not end_stream or (trailers is not None and not trailers.is_trailers) or call.body_left > 0:
            self._stream_error(call.stream_id, frames.PROTOCOL_ERROR, "malformed trailers")
        else:
            call.remote_closed = True
            self._data_received(call, b"", True)

    def _data_received(self, stream: ServerCall, data: bytes, end_stream: bool) -> None:
        try:
            stream.receive(data, end_stream)
        except Exception as error:
            stream.fail(self.status_of(error))

    def _remove_stream(self, stream: ServerCall) -> None:  # type: ignore[override]  # a server's streams are calls
        super()._remove_stream(stream)
        stream.release()

    def _stream_aborted(self, stream: ServerCall, code: int, message: str) -> None:
        stream.cancel()
        self._close_if_drained()

    def _goaway_received(self, last_stream_id: int) -> None:
        self.drain()

    def _end_sent(self, stream: ServerCall) -> None:
        super()._end_sent(stream)
        self._count_progress()
        if self._is_draining:
            self._close_if_drained()

    def _connection_lost(self) -> None:
        self._server.connections.remove(self)

    def connection_lost(self, exc: Exception | None) -> None:
        calls = tuple(self._streams.values())
        super().connection_lost(exc)
        for call in calls:
            call.cancel()

    def tick(self, now: float) -> None:
        """Also apply the handshake timeout, age, idle time and the deadlines of calls."""
        super().tick(now)
        if self._closing_since:
            return
        if not self._has_settings and now - self._opened_at > HANDSHAKE_TIMEOUT_S:
            self.abort()
        for call in tuple(self._streams.values()):
            call.tick(now)
        if self._streams or self._last_stream_id != self._id_at_tick:
            self._id_at_tick, self._idle_since = self._last_stream_id, now
        is_ping_pending = self._is_draining and self._max_accepted_id == frames.MAX_STREAM_ID
        if is_ping_pending and now - self._draining_since > (
            DRAIN_PING_TIMEOUT_S if self._has_settings else FIRST_REQUEST_GRACE_S
        ):
            self._is_client_silent = True
            self._refuse_new_streams()
        if self._closing_ping_at and now - self._closing_ping_at > DRAIN_PING_TIMEOUT_S:
            self.close()
        if now > self._drain_at or now - self._idle_since > self._limits.max_connection_idle_s:
            self.drain()
        if now > self._drain_at + self._limits.max_connection_age_grace_s:
            self.end("connection age exceeds its limit and its grace")

    def drain(self) -> None:
        """Accept no new calls, and close when those in flight are answered.

        Calls that were sent before the client knows are still served: the first GOAWAY names no last stream, the second does once
        the client has acknowledged the first. Source: RFC 9113, section 6.8.
        """
        if self._is_draining or self._closing_since:
            return
        self._is_draining, self._draining_since = True, self.now()
        self._write_soon(frames.goaway(frames.MAX_STREAM_ID, frames.NO_ERROR))
        self._send_drain_ping()

    def _drain_ping_acknowledged(self) -> None:
        if self._closing_ping_at:
            self.close()
        elif self._is_draining:
            self._refuse_new_streams()

    def _refuse_new_streams(self) -> None:
        self._max_accepted_id = self._last_stream_id
        self._write_soon(frames.goaway(self._last_stream_id, frames.NO_ERROR))
        self._close_if_drained()

    def _close_if_drained(self) -> None:
        """Close once the client has received the last answer.

        Closed before, frames that the client still sends, e.g. WINDOW_UPDATE, would be answered by a TCP reset, and a client that
        notices it first (haproxy) cuts the answer off.
        """
        is_drained = self._max_accepted_id != frames.MAX_STREAM_ID and not self._streams
        if not is_drained or self._closing_since:
            return
        if self._is_client_silent:
            self.close()
        elif not self._closing_ping_at:
            self._closing_ping_at = self.now()
            self._send_drain_ping()

    def end(self, reason: str) -> None:
        """End the calls in flight as UNAVAILABLE, then close."""
        for call in tuple(self._streams.values()):
            call.fail(CallError("UNAVAILABLE", reason))
        self.close()


class GrpcServer:
    """Listens from `start` to `stop`.

    Args:
        handlers: by path, ``/package.Service/Method``.
        sockets: that listen.
        limits: on clients.
        status_of: the status for an exception of a handler that is not a `CallError`.
        new_reservation: what a call reserves the bytes of its message from, as they arrive.
        context: of TLS; None: plain text.
    """

    def __init__(
        self,
        handlers: Mapping[str, MethodHandler],
        sockets: Sequence[socket.socket],
        limits: ServerLimits,
        *,
        status_of: Callable[[Exception], CallError],
        new_reservation: Callable[[], CallReservation],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.handlers = handlers
        self.status_of = status_of
        self.new_reservation = new_reservation
        self.limits = limits
        self.connections: Connections[GrpcServerConnection] = Connections()
        self._acceptors = [Acceptor(socket, lambda: GrpcServerConnection(self), context) for socket in sockets]
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections."""
        for acceptor in self._acceptors:
            acceptor.start()
        self._ticking = asyncio.create_task(self._keep_ticking())

    async def stop(self, grace_s: float = 0.0) -> None:
        """Accept no new calls, and give those in flight ``grace_s`` to finish; calls that remain end as UNAVAILABLE."""
        await asyncio.gather(*[acceptor.stop() for acceptor in self._acceptors])
        self.connections.drain()
        await self.connections.wait_closed(grace_s)
        for connection in self.connections:
            connection.end("server is shutting down")
        await self.connections.wait_closed(CLOSE_GRACE_S)
        await self.connections.abort()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(self.limits.tick_interval_s)
            self.connections.tick()
