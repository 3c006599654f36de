"""A gRPC server on our own HTTP/2 connections: no threads, and no task for a call but that of its handler.

See docs/decisions/0017.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from splitserve.wire.grpc.call import END_ALL, Call, Method, Reservation
from splitserve.wire.grpc.messages import CallError
from splitserve.wire.grpc.request import Request, understand
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import LOOK_INTERVAL_S, Connection
from splitserve.wire.http2.frames import PREFACE
from splitserve.wire.http2.headers import NO_TABLE, ConnectionFault, HeaderDecoder, TooManyHeaders, encode
from splitserve.wire.listening import BACKLOG, HANDSHAKE_TIMEOUT_S, Connections

MAX_AGE_S, AGE_GRACE_S = 60.0, 120.0
"""A client that keeps its connections never learns of new replicas: each is ended at about this age, calls on it first."""

AGE_JITTER = 0.1

CLOSE_GRACE_S = 0.5
"""How long clients get to take the last bytes when the server stops."""


class ServerLimits(msgspec.Struct, frozen=True):
    """What callers may cost. Sizes are in bytes."""

    max_message_bytes: int = 64 * 1024 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_streams: int = 1024
    max_connections: int = 2_000
    silent_s: float = 5.0


_NO_GRPC = NO_TABLE + encode([(b":status", b"415")])
_numbers = itertools.count()


class ServerConnection(Connection):
    """One client's connection."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__(silent_s=server.limits.silent_s)
        self.new_future: Callable[[], asyncio.Future[None]] = self._loop.create_future
        self.new_task: Callable[[Any], asyncio.Task[None]] = self._loop.create_task
        self.now: Callable[[], float] = self._loop.time
        self._server = server
        self.limits = server.limits
        self.new_reservation = server.new_reservation
        self.name = f"grpc:{next(_numbers)}"
        self._headers: HeaderDecoder[Request] = HeaderDecoder(understand, server.limits.max_metadata_bytes)
        self._preface = b""
        self._is_greeted = False
        self._last = 0
        self._last_taken = frames.MAX_STREAM
        self._made_at = self.now()
        self._retire_at = self._made_at + MAX_AGE_S * random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)  # noqa: S311
        self._is_retiring = False

    def explain(self, error: Exception) -> CallError:
        """The status that an error of a handler ends its call with."""
        return error if isinstance(error, CallError) else self._server.explain(error)

    def has(self, call: Call) -> bool:
        """Whether the call is still open."""
        return self._streams.get(call.number) is call

    def write(self, data: bytes) -> None:
        """Send frames that need no room."""
        if not self._closing_since:
            self._put(data)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)
        if len(self._server.connections) > self.limits.max_connections:
            self.abort()

    def data_received(self, data: bytes) -> None:
        if not self._is_greeted:
            self._preface += data
            if not PREFACE.startswith(self._preface[: len(PREFACE)]):
                self.abort()
                return
            if len(self._preface) < len(PREFACE):
                return
            self._is_greeted = True
            self._greet(
                b"",
                {
                    frames.MAX_CONCURRENT_STREAMS: self.limits.max_streams,
                    frames.MAX_HEADER_LIST_SIZE: self.limits.max_metadata_bytes,
                },
            )
            data = self._preface[len(PREFACE) :]
        super().data_received(data)

    def _settings_agreed(self) -> None:
        self._headers.forbid_table()

    def _is_past(self, stream: int) -> bool:
        return stream <= self._last

    def _take_block(self, stream: int, block: bytes, is_end: bool) -> None:
        request: Request | None
        try:
            request = self._headers.decode(block)
        except TooManyHeaders:
            request = None
        call = self._streams.get(stream)
        if call is not None:
            self._take_trailers(call, is_end)
            return
        if not stream & 1 or stream <= self._last:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a stream with a number that is none for a new one")
        if stream > self._last_taken:
            return  # the peer was told that it is not looked at
        self._last = stream
        if len(self._streams) >= self.limits.max_streams:
            self._refuse(stream, frames.REFUSED_STREAM)
        elif request is not None and request.is_malformed:
            self._refuse(stream, frames.PROTOCOL_ERROR)
        else:
            self._open(stream, request, is_end)

    def _refuse(self, stream: int, code: int) -> None:
        self._make_noise()
        self._put(frames.reset(stream, code))

    def _open(self, stream: int, request: Request | None, is_end: bool) -> None:
        if request is None:
            error = CallError("RESOURCE_EXHAUSTED", f"the metadata is larger than {self.limits.max_metadata_bytes} bytes")
            request = Request("", None, b"", (), error)
        method = self._server.methods.get(request.path)
        call = Call(self, stream, self._stream_send_window, request, method or Method())
        self._streams[stream] = call
        if not request.is_grpc:
            self.send_frames(call, frames.frame(frames.HEADERS, END_ALL, stream, _NO_GRPC))
        elif request.refusal is not None:
            call.fail(request.refusal)
        elif method is None:
            call.fail(CallError("UNIMPLEMENTED", "there is no such method here"))
        elif request.timeout_s == 0:
            call.fail(CallError("DEADLINE_EXCEEDED", "out of time before the work began"))
        else:
            call.start()
            if is_end:
                self._take_content(call, b"", True)

    def _take_trailers(self, call: Call, is_end: bool) -> None:
        if not is_end:
            call.cancel()
            self.reset(call, frames.PROTOCOL_ERROR)
        else:
            self._take_content(call, b"", True)

    def _take_content(self, stream: Call, content: bytes, is_end: bool) -> None:
        if stream.has_ended:
            stream.cancel()
            self.reset(stream, frames.STREAM_CLOSED)
            return
        try:
            stream.receive(content, is_end)
        except Exception as error:
            stream.fail(self.explain(error))

    def _drop(self, stream: Call) -> None:  # type: ignore[override]  # a server's streams are calls
        super()._drop(stream)
        stream.release()

    def _take_reset(self, stream: Call, code: int) -> None:
        stream.cancel()
        self._close_if_done()

    def _take_goodbye(self, last_stream: int) -> None:
        self.drain()

    def _sent(self, stream: Call) -> None:
        super()._sent(stream)
        self._noise = 0
        self._close_if_done()

    def _end(self) -> None:
        self._server.connections.remove(self)

    def connection_lost(self, exc: Exception | None) -> None:
        calls = tuple(self._streams.values())
        super().connection_lost(exc)
        for call in calls:
            call.cancel()

    def tick(self, now: float) -> None:
        """Besides what both ends look at: deadlines, its age, and whether it has said that it is HTTP/2."""
        super().tick(now)
        if not self._has_settings and now - self._made_at > HANDSHAKE_TIMEOUT_S:
            self.abort()
        if now > self._retire_at:
            self.drain()
        if now > self._retire_at + AGE_GRACE_S:
            self.abort()
        for call in tuple(self._streams.values()):
            call.tick(now)

    def drain(self) -> None:
        """Take no new calls, and close when those under way are answered.

        Calls that were sent before the peer knows of it are still served. Source: RFC 9113, section 6.8.
        """
        if self._is_retiring or self._closing_since:
            return
        self._is_retiring = True
        if not self._is_greeted:
            self.abort()
            return
        self._put(frames.goaway(frames.MAX_STREAM, frames.NO_ERROR))
        self.ask_last_call()

    def _last_call_heard(self) -> None:
        if self._is_retiring:
            self._last_taken = self._last
            self._put(frames.goaway(self._last, frames.NO_ERROR))
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._last_taken != frames.MAX_STREAM and not self._streams:
            self.close(last_stream=self._last)


class GrpcServer:
    """Listens from `start` to `stop`.

    Args:
        methods: by their paths, ``/package.Service/Method``.
        socket: that listens.
        limits: of what callers may cost.
        explain: what an exception of a handler is to its caller, unless it is a `CallError`.
        new_reservation: what a call takes the bytes of its message from, as they come.
        context: of TLS; None: plain text.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        socket: socket.socket,
        limits: ServerLimits,
        *,
        explain: Callable[[Exception], CallError],
        new_reservation: Callable[[], Reservation],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.methods = methods
        self.explain = explain
        self.new_reservation = new_reservation
        self.limits = limits
        self.connections = Connections()
        self._socket = socket
        self._context = context
        self._server: asyncio.Server | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take connections."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: ServerConnection(self),
            sock=self._socket,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._context else None,
            backlog=BACKLOG,
        )
        self._looking = asyncio.create_task(self._keep_looking())

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no new calls, and give those under way so long to finish."""
        if self._server is None or self._looking is None:
            self._socket.close()
            return
        self._server.close()
        self.connections.drain()
        await self.connections.wait_closed(grace_s)
        self.connections.close()
        await self.connections.wait_closed(CLOSE_GRACE_S)
        self.connections.abort()
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(min(LOOK_INTERVAL_S, self.limits.silent_s / 2))
            self.connections.tick()
