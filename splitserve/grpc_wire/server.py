"""A gRPC server on our own HTTP/2 connections: no threads, and no task for a call but that of its handler.

See docs/decisions/0017.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from splitserve.grpc_wire.listening import BACKLOG
from splitserve.grpc_wire.messages import (
    ACCEPTED,
    CONTENT_TYPE,
    ENCODINGS,
    PREFIX,
    CallError,
    MessageReader,
    Metadata,
    encode_metadata,
    encode_text,
    prefix_of,
    status_code,
    timeout_s,
)
from splitserve.http2 import frames
from splitserve.http2.connection import LOOK_INTERVAL_S, Connection, Stream
from splitserve.http2.frames import HEAD, PREFACE
from splitserve.http2.headers import NO_TABLE, ConnectionFault, HeaderDecoder, Headers, TooManyHeaders, encode

HANDSHAKE_TIMEOUT_S = 10.0
"""Within which a connection must say that it is HTTP/2."""

MAX_AGE_S, AGE_GRACE_S = 60.0, 120.0
"""A client that keeps its connections never learns of new replicas: each is ended at about this age, calls on it first."""

AGE_JITTER = 0.1

CLOSE_GRACE_S = 0.5
"""How long clients get to take the last bytes when the server stops."""

MAX_STATUS_BYTES = 8 * 1024
"""Of what tells of an error. Without its details, which come last, it is still told."""

Unary = Callable[[bytes, "Call"], Awaitable[bytes]]
"""Answers one message with one."""


class Pending(Protocol):
    """What is under way for a call. A task is one."""

    def cancel(self) -> object:
        """Its caller has left."""


Begin = Callable[[bytes, "Call", Callable[[bytes | Exception], None]], Pending]
"""The same without a task: what it is given is told of the answer, or of the error, later. May raise at once."""

Streaming = Callable[["Call"], Awaitable[None]]
"""Reads messages from the call and writes others to it; the call ends as it returns."""


class Method(msgspec.Struct, frozen=True):
    """What serves a method: one of the three; of the first two ``begin``, if there is one."""

    unary: Unary | None = None
    begin: Begin | None = None
    streaming: Streaming | None = None


class Share(Protocol):
    """What one call holds of all the bytes that may be held."""

    def take(self, n_bytes: int) -> None:
        """May raise that so many more are too many."""

    def give_back(self) -> None:
        """The call is over."""


class ServerLimits(msgspec.Struct, frozen=True):
    """What callers may cost. Sizes are in bytes."""

    max_message_bytes: int = 64 * 1024 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_streams: int = 1024
    max_connections: int = 2_000
    silent_s: float = 5.0


_BEGIN = NO_TABLE + b"\x88" + encode([(b"content-type", CONTENT_TYPE), (b"grpc-accept-encoding", ACCEPTED)])
"""Of every answer; its second byte is ``:status 200``. Source: RFC 7541, appendix A."""

_OK = encode([(b"grpc-status", b"0")])
_NO_GRPC = NO_TABLE + encode([(b":status", b"415")])

_END_HEADERS = frames.END_HEADERS
_END_ALL = frames.END_HEADERS | frames.END_STREAM
_numbers = itertools.count()


class _Request(msgspec.Struct, frozen=True):
    """What the headers of a call say. Made once for equal headers."""

    path: str
    timeout_s: float | None
    encoding: bytes
    metadata: tuple[tuple[str, str], ...]
    refusal: CallError | None = None
    is_malformed: bool = False
    is_grpc: bool = True


_MALFORMED = _Request("", None, b"", (), is_malformed=True)
_NAME = re.compile(rb"[^\x00-\x20A-Z\x7f-\xff:]+")
_OF_HTTP_1 = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")


def _understand(headers: Headers) -> _Request:
    """Source: RFC 9113, section 8.2 and 8.3."""
    pseudo: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    for name, value in headers:
        if name.startswith(b":"):
            if metadata or name in pseudo or name not in (b":method", b":scheme", b":path", b":authority"):
                return _MALFORMED
            pseudo[name] = value
        elif not _NAME.fullmatch(name) or name in _OF_HTTP_1 or any(byte in value for byte in b"\0\r\n"):
            return _MALFORMED
        else:
            metadata[name] = b"%b,%b" % (metadata[name], value) if name in metadata else value
    if pseudo.get(b":method") != b"POST" or not pseudo.get(b":path") or b":scheme" not in pseudo:
        return _MALFORMED
    refusal, timeout = None, metadata.pop(b"grpc-timeout", None)
    encoding = metadata.get(b"grpc-encoding", b"identity")
    try:
        seconds = None if timeout is None else timeout_s(timeout)
    except ValueError:
        seconds = None
        refusal = CallError("INVALID_ARGUMENT", "grpc-timeout: expected up to 8 digits and one of H, M, S, m, u, n")
    if encoding != b"identity" and encoding not in ENCODINGS:
        refusal = CallError("UNIMPLEMENTED", "grpc-encoding: only identity, deflate and gzip are taken")
    return _Request(
        path=pseudo[b":path"].decode(errors="replace"),
        timeout_s=seconds,
        encoding=b"" if encoding == b"identity" else encoding,
        metadata=tuple((name.decode(errors="replace"), value.decode(errors="replace")) for name, value in metadata.items()),
        refusal=refusal,
        is_grpc=metadata.get(b"content-type", b"").startswith(CONTENT_TYPE),
    )


class Call(Stream):
    """One call, as its handler sees it."""

    __slots__ = (
        "_connection",
        "_deadline",
        "_is_answered",
        "_messages",
        "_method",
        "_n_held",
        "_pending",
        "_request",
        "_share",
        "_waiting",
        "has_ended",
        "trailing",
    )

    def __init__(self, connection: ServerConnection, number: int, window: int, request: _Request, method: Method) -> None:
        super().__init__(number, window)
        self._connection = connection
        self._request = request
        self._method = method
        self._deadline = None if request.timeout_s is None else connection.now() + request.timeout_s
        self._messages = MessageReader(connection.limits.max_message_bytes, request.encoding)
        self._is_answered = False
        self.has_ended = False
        """Whether the caller has sent all."""
        self._n_held = 0
        self._share: Share | None = None
        self._pending: Pending | None = None
        self._waiting: asyncio.Future[None] | None = None
        self.trailing: Metadata = ()
        """Trailing metadata of an answer that is OK."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the caller sent along, names in lower case."""
        return self._request.metadata

    @property
    def peer(self) -> str:
        """A name for the connection that the call came on."""
        return self._connection.name

    def remaining_s(self) -> float | None:
        """Seconds until its deadline; None if it has none."""
        return None if self._deadline is None else self._deadline - self._connection.now()

    # For handlers of streams.

    async def read(self) -> bytes | None:
        """The next message; None when the caller has sent all.

        Raises:
            CallError: what comes is no message that may be.
        """
        while True:
            message = self._messages.take()
            if message is not None:
                return message
            if self.has_ended:
                if not self._messages.is_empty:
                    raise CallError("INTERNAL", "the stream ends in the middle of a message")
                return None
            self._connection.give_room(self, self._n_held)
            self._n_held = 0
            self._waiting = self._connection.new_future()
            try:
                await self._waiting
            finally:
                self._waiting = None

    def begin(self, metadata: Metadata = ()) -> None:
        """Send initial metadata now, rather than with the first message."""
        if not self._is_answered and self._connection.has(self):
            self._is_answered = True
            block = _BEGIN + encode(encode_metadata(metadata))
            self._connection.write(frames.frame(frames.HEADERS, _END_HEADERS, self.number, block))

    async def write(self, message: bytes) -> None:
        """Send a message; returns when it is on its way, or the caller has left. Raises as `post`."""
        self.post(message)
        if self.backlog:
            await self.drained()

    async def drained(self) -> None:
        """Wait until what was posted is on its way, or the caller has left."""
        await self._connection.drained(self)

    def post(self, message: bytes) -> None:
        """Send a message; where there is no room for it, it is in `backlog` until there is.

        Raises:
            CallError: it is larger than it may be.
        """
        prefix = prefix_of(message, self._connection.limits.max_message_bytes)
        if not self._is_answered:
            self.begin()
        if self._connection.has(self):
            self._connection.send(self, b"", prefix, message)

    # For the connection.

    def start(self) -> None:
        """Its headers have come."""
        if self._method.streaming is not None:
            self._pending = self._connection.new_task(self._stream(self._method.streaming))

    def receive(self, content: bytes, is_end: bool) -> None:
        """Content has come, the last with ``is_end``."""
        self._messages.feed(content)
        self.has_ended = is_end
        if self._method.streaming is None:
            n_bytes = len(content)
            if self._share is None:
                self._share = self._connection.new_share()
                n_bytes = max(0, n_bytes - PREFIX.size)
            self._share.take(n_bytes)
            if is_end:
                message = self._messages.take()
                if message is None or not self._messages.is_empty:
                    raise CallError("UNIMPLEMENTED", "expected one message")
                self._serve(message)
            else:
                self._messages.check_size()
                self._connection.give_room(self, len(content))
        elif self._waiting is not None:
            if not is_end:
                self._connection.give_room(self, len(content))
            if not self._waiting.done():
                self._waiting.set_result(None)
        else:
            self._n_held += len(content)

    def look(self, now: float) -> None:
        """End it if its time is over."""
        if self._deadline is not None and now > self._deadline:
            self.fail(CallError("DEADLINE_EXCEEDED", "out of time before the answer came"))

    def give_back(self) -> None:
        """It is over."""
        if self._share is not None:
            self._share.give_back()

    def cancel(self) -> None:
        """Its caller has left."""
        if self._pending is not None:
            self._pending.cancel()

    def fail(self, error: CallError) -> None:
        """End it with this status, whatever its handler is at."""
        self.cancel()
        if not self._connection.has(self):
            return
        trailers = _trailers(error.code, error.message, error.trailing)
        if not self._is_answered:
            trailers = _BEGIN + trailers
        self._finish(frames.frame(frames.HEADERS, _END_ALL, self.number, trailers))

    def _finish(self, trailers: bytes) -> None:
        if not self.has_ended:  # what is still on its way is of no use
            trailers += frames.reset(self.number, frames.NO_ERROR)
        self._connection.send_frames(self, trailers)

    def _serve(self, message: bytes) -> None:
        if self._method.begin is not None:
            self._pending = self._method.begin(message, self, self._end)
        elif self._method.unary is not None:
            self._pending = self._connection.new_task(self._answer(self._method.unary, message))

    async def _answer(self, handler: Unary, message: bytes) -> None:
        try:
            outcome: bytes | Exception = await handler(message, self)
        except Exception as error:
            outcome = error
        self._end(outcome)

    def _end(self, outcome: bytes | Exception) -> None:
        """It is answered, or failed."""
        self._pending = None
        if isinstance(outcome, Exception):
            self.fail(self._connection.explain(outcome))
            return
        try:
            prefix = prefix_of(outcome, self._connection.limits.max_message_bytes)
        except CallError as error:
            self.fail(error)
            return
        if not self._connection.has(self):
            return
        self._is_answered = True
        number = self.number
        before = HEAD.pack(0, len(_BEGIN), frames.HEADERS, _END_HEADERS, number) + _BEGIN
        trailers = _OK if not self.trailing else _OK + encode(encode_metadata(self.trailing))
        tail = HEAD.pack(len(trailers) >> 8, len(trailers) & 0xFF, frames.HEADERS, _END_ALL, number) + trailers
        self._connection.send(self, before, prefix, outcome, tail)

    async def _stream(self, handler: Streaming) -> None:
        try:
            await handler(self)
        except Exception as error:
            self._pending = None
            self.fail(self._connection.explain(error))
        else:
            self.begin()
            if self._connection.has(self):
                self._finish(frames.frame(frames.HEADERS, _END_ALL, self.number, _OK + encode(encode_metadata(self.trailing))))


@functools.lru_cache(maxsize=16)
def _status(code: str) -> bytes:
    return str(status_code(code)).encode()


def _trailers(code: str, message: str, trailing: Metadata) -> bytes:
    told = [(b"grpc-status", _status(code)), (b"grpc-message", encode_text(message)[: MAX_STATUS_BYTES // 2])]
    whole = encode([*told, *encode_metadata(trailing)])
    return whole if len(whole) <= MAX_STATUS_BYTES else encode(told)


class ServerConnection(Connection):
    """One client's connection."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__(silent_s=server.limits.silent_s)
        self.new_future: Callable[[], asyncio.Future[None]] = self._loop.create_future
        self.new_task: Callable[[Any], asyncio.Task[None]] = self._loop.create_task
        self.now: Callable[[], float] = self._loop.time
        self._server = server
        self.limits = server.limits
        self.new_share = server.new_share
        self.name = f"grpc:{next(_numbers)}"
        self._headers: HeaderDecoder[_Request] = HeaderDecoder(_understand, server.limits.max_metadata_bytes)
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
            self.abandon()

    def data_received(self, data: bytes) -> None:
        if not self._is_greeted:
            self._preface += data
            if not PREFACE.startswith(self._preface[: len(PREFACE)]):
                self.abandon()
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
        request: _Request | None
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
            return  # the far end was told that it is not looked at
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

    def _open(self, stream: int, request: _Request | None, is_end: bool) -> None:
        if request is None:
            error = CallError("RESOURCE_EXHAUSTED", f"the metadata is larger than {self.limits.max_metadata_bytes} bytes")
            request = _Request("", None, b"", (), error)
        method = self._server.methods.get(request.path)
        call = Call(self, stream, self._stream_send_window, request, method or Method())
        self._streams[stream] = call
        if not request.is_grpc:
            self.send_frames(call, frames.frame(frames.HEADERS, _END_ALL, stream, _NO_GRPC))
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
        stream.give_back()

    def _take_reset(self, stream: Call, code: int) -> None:
        stream.cancel()
        self._close_if_done()

    def _take_goodbye(self, last_stream: int) -> None:
        self.retire()

    def _sent(self, stream: Call) -> None:
        super()._sent(stream)
        self._noise = 0
        self._close_if_done()

    def _end(self) -> None:
        self._server.leave(self)

    def connection_lost(self, exc: Exception | None) -> None:
        calls = tuple(self._streams.values())
        super().connection_lost(exc)
        for call in calls:
            call.cancel()

    def look(self, now: float) -> None:
        """Besides what both ends look at: deadlines, its age, and whether it has said that it is HTTP/2."""
        super().look(now)
        if not self._has_settings and now - self._made_at > HANDSHAKE_TIMEOUT_S:
            self.abandon()
        if now > self._retire_at:
            self.retire()
        if now > self._retire_at + AGE_GRACE_S:
            self.abandon()
        for call in tuple(self._streams.values()):
            call.look(now)

    def retire(self) -> None:
        """Take no new calls, and close when those under way are answered.

        Calls that were sent before the far end knows of it are still served. Source: RFC 9113, section 6.8.
        """
        if self._is_retiring or self._closing_since:
            return
        self._is_retiring = True
        if not self._is_greeted:
            self.abandon()
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
        new_share: what a call takes the bytes of its message from, as they come.
        context: of TLS; None: plain text.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        socket: socket.socket,
        limits: ServerLimits,
        *,
        explain: Callable[[Exception], CallError],
        new_share: Callable[[], Share],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.methods = methods
        self.explain = explain
        self.new_share = new_share
        self.limits = limits
        self.connections: set[ServerConnection] = set()
        self._socket = socket
        self._context = context
        self._server: asyncio.Server | None = None
        self._looking: asyncio.Task[None] | None = None
        self._is_empty = asyncio.Event()

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
        for connection in tuple(self.connections):
            connection.retire()
        await self._until_empty(grace_s)
        for connection in tuple(self.connections):
            connection.close()
        await self._until_empty(CLOSE_GRACE_S)
        for connection in tuple(self.connections):
            connection.abandon()
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)

    async def _until_empty(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connections:
                    self._is_empty.clear()
                    await self._is_empty.wait()

    def leave(self, connection: ServerConnection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._is_empty.set()

    async def _keep_looking(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(LOOK_INTERVAL_S, self.limits.silent_s / 2))
            for connection in tuple(self.connections):
                connection.look(loop.time())
