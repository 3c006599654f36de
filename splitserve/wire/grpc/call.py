"""One call at a server: the messages received, the response, and the handler in between."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from splitserve.wire.cancellable import Cancellable
from splitserve.wire.grpc.messages import (
    ACCEPT_ENCODING,
    CONTENT_TYPE,
    PREFIX,
    CallError,
    MessageReader,
    Metadata,
    encode_metadata,
    message_prefix,
    percent_encode,
    status_code,
)
from splitserve.wire.grpc.request import RequestHeaders
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import Http2Connection, Http2Stream
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, encode

MAX_STATUS_BYTES = 8 * 1024
"""Limit on the trailers of an error. Its details, which come last, are omitted if they exceed it."""

UnaryHandler = Callable[[bytes, "ServerCall"], Awaitable[bytes]]
"""Answers one message with one."""

CallbackHandler = Callable[[bytes, "ServerCall", Callable[[bytes | Exception], None]], Cancellable]
"""The same without a task: calls back with the response or the error, later. May raise at once instead."""

StreamHandler = Callable[["ServerCall"], Awaitable[None]]
"""Reads messages from the call and writes others to it; the call ends when it returns."""


class MethodHandler(msgspec.Struct, frozen=True):
    """What serves a method: one of the three; ``begin``, if there is one, is preferred to ``unary``."""

    unary: UnaryHandler | None = None
    begin: CallbackHandler | None = None
    streaming: StreamHandler | None = None


class CallReservation(Protocol):
    """The bytes that a call has reserved of all that may be in flight."""

    def reserve(self, n_bytes: int) -> None:
        """Reserve more. An exception is the call's error."""

    def release(self) -> None:
        """The call is over."""


class CallConnection(Http2Connection):
    """What a call needs of its connection, besides HTTP/2."""

    peer: str
    """Identifies the connection."""

    max_message_bytes: int
    new_reservation: Callable[[], CallReservation]

    def status_of(self, error: Exception) -> CallError:
        """The status that an exception of a handler ends its call with."""
        raise NotImplementedError


_HEADERS = TABLE_SIZE_ZERO + b"\x88" + encode([(b"content-type", CONTENT_TYPE), (b"grpc-accept-encoding", ACCEPT_ENCODING)])
"""Of every response; the second byte is ``:status 200``. Source: RFC 7541, appendix A."""

_NOT_GRPC_HEADERS = {
    status: TABLE_SIZE_ZERO + encode([(b":status", str(status).encode()), *more, (b"content-type", CONTENT_TYPE)])
    for status, more in {405: [(b"allow", b"POST")], 415: []}.items()
}
_OK_TRAILERS = encode([(b"grpc-status", b"0")])
_END = frames.END_HEADERS | frames.END_STREAM
_HEADERS_FRAME = frames.around_stream_id(frames.HEADERS, frames.END_HEADERS, _HEADERS)
_OK_FRAME = frames.around_stream_id(frames.HEADERS, _END, _OK_TRAILERS)


class ServerCall(Http2Stream):
    """One call, as its handler sees it."""

    __slots__ = (
        "_connection",
        "_deadline",
        "_handler",
        "_has_sent_headers",
        "_messages",
        "_n_unread",
        "_pending",
        "_read_waiter",
        "_request",
        "_reservation",
        "trailing_metadata",
    )

    def __init__(
        self, connection: CallConnection, stream_id: int, send_window: int, request: RequestHeaders, handler: MethodHandler
    ) -> None:
        super().__init__(stream_id, send_window)
        self.body_left = request.content_length
        self._connection = connection
        self._request = request
        self._handler = handler
        self._deadline = None if request.timeout_s is None else connection.now() + request.timeout_s
        self._messages = MessageReader(connection.max_message_bytes, request.encoding)
        self._has_sent_headers = False
        self._n_unread = 0
        """Bytes received on a stream while its handler was not reading."""
        self._reservation: CallReservation | None = None
        self._pending: Cancellable | None = None
        """The handler at work."""
        self._read_waiter: asyncio.Future[None] | None = None
        self.trailing_metadata: Metadata = ()
        """Sent with the status OK."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The client's, names in lower case."""
        return self._request.metadata

    @property
    def peer(self) -> str:
        """Identifies the connection."""
        return self._connection.peer

    @property
    def address(self) -> str:
        """The peer's address, ``host:port``; "" if it has none."""
        return self._connection.peer_address

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None if there is none."""
        return None if self._deadline is None else self._deadline - self._connection.now()

    # For handlers of streams.

    async def read(self) -> bytes | None:
        """The next message; None once the client has half-closed.

        Raises:
            CallError: what arrived is not a valid message.
        """
        while True:
            message = self._messages.take()
            if message is not None:
                return message
            if self.remote_closed:
                if not self._messages.is_empty:
                    raise CallError("INTERNAL", "the stream ends within a message")
                return None
            self._connection.acknowledge(self, self._n_unread)
            self._n_unread = 0
            self._read_waiter = self._connection.create_future()
            try:
                await self._read_waiter
            finally:
                self._read_waiter = None

    def send_initial_metadata(self, metadata: Metadata = ()) -> None:
        """Send the response headers now rather than with the first message."""
        if not self._has_sent_headers and self._connection.is_open(self):
            self._has_sent_headers = True
            block = _HEADERS + encode(encode_metadata(metadata))
            self._connection.write_frames(frames.frame(frames.HEADERS, frames.END_HEADERS, self.stream_id, block))

    async def write(self, message: bytes) -> None:
        """Send a message; returns when the send queue is empty or the client has left. Raises as `write_nowait`."""
        self.write_nowait(message)
        if self.send_queue:
            await self.drain()

    async def drain(self) -> None:
        """Wait until the send queue is empty, or the client has left."""
        await self._connection.drain_stream(self)

    def write_nowait(self, message: bytes) -> None:
        """Send a message, or queue what the client's flow-control windows do not allow yet (`send_queue`).

        Raises:
            CallError: it exceeds the limit of messages.
        """
        prefix = message_prefix(message, self._connection.max_message_bytes)
        if not self._has_sent_headers:
            self.send_initial_metadata()
        if self._connection.is_open(self):
            self._connection.send(self, b"", prefix, message)

    # For the connection.

    def start(self) -> None:
        """The headers have arrived."""
        if self._handler.streaming is not None:
            self._pending = asyncio.get_running_loop().create_task(self._run_stream(self._handler.streaming))

    def receive(self, data: bytes, end_stream: bool) -> None:
        """DATA has arrived. Raises as the handler, or `CallReservation.reserve`."""
        self._messages.feed(data)
        if self._handler.streaming is None:
            n_bytes = len(data)
            if self._reservation is None:
                self._reservation = self._connection.new_reservation()
                n_bytes = max(0, n_bytes - PREFIX.size)
            self._reservation.reserve(n_bytes)
            if end_stream:
                message = self._messages.take()
                if message is None or not self._messages.is_empty:
                    raise CallError("UNIMPLEMENTED", "expected one message")
                self._serve(message)
            else:
                self._messages.check_size()
                self._connection.acknowledge(self, len(data))
        elif self._read_waiter is not None:
            if not end_stream:
                self._connection.acknowledge(self, len(data))
            if not self._read_waiter.done():
                self._read_waiter.set_result(None)
        else:
            self._n_unread += len(data)

    def tick(self, now: float) -> None:
        """End the call if its deadline has passed."""
        if self._deadline is not None and now > self._deadline:
            self.fail(CallError("DEADLINE_EXCEEDED", "deadline exceeded before the response"))

    def release(self) -> None:
        """The call is over."""
        if self._reservation is not None:
            self._reservation.release()

    def cancel(self) -> None:
        """The client has left."""
        if self._pending is not None:
            self._pending.cancel()

    def fail(self, error: CallError) -> None:
        """Cancel the handler, and end the call with this status."""
        self.cancel()
        if not self._connection.is_open(self):
            return
        trailers = _error_trailers(error.code, error.message, (*error.trailing, *self.trailing_metadata))
        if not self._has_sent_headers:
            trailers = _HEADERS + trailers
        self._finish(trailers)

    def reject(self, http_status: int, error: CallError) -> None:
        """End a request that is not gRPC with an HTTP status. Source: gRPC, doc/PROTOCOL-HTTP2.md, Responses."""
        self._finish(_NOT_GRPC_HEADERS[http_status] + _error_trailers(error.code, error.message, ()))

    def _finish(self, trailers: bytes) -> None:
        final_frames = frames.frame(frames.HEADERS, _END, self.stream_id, trailers)
        if not self.remote_closed:  # what is still arriving is not needed. Source: RFC 9113, section 8.1
            final_frames += frames.rst_stream(self.stream_id, frames.NO_ERROR)
        self._connection.end_stream(self, final_frames)

    def _serve(self, message: bytes) -> None:
        if self._handler.begin is not None:
            self._pending = self._handler.begin(message, self, self._end)
        elif self._handler.unary is not None:
            self._pending = asyncio.get_running_loop().create_task(self._run_unary(self._handler.unary, message))

    async def _run_unary(self, handler: UnaryHandler, message: bytes) -> None:
        try:
            outcome: bytes | Exception = await handler(message, self)
        except Exception as error:
            outcome = error
        self._end(outcome)

    def _end(self, outcome: bytes | Exception) -> None:
        """The handler's response, or its error."""
        self._pending = None
        if isinstance(outcome, Exception):
            self.fail(self._connection.status_of(outcome))
            return
        try:
            prefix = message_prefix(outcome, self._connection.max_message_bytes)
        except CallError as error:
            self.fail(error)
            return
        if not self._connection.is_open(self):
            return
        self._has_sent_headers = True
        stream_id = frames.UINT32.pack(self.stream_id)
        final_frames = stream_id.join(_OK_FRAME)
        if self.trailing_metadata:
            trailers = _OK_TRAILERS + encode(encode_metadata(self.trailing_metadata))
            final_frames = frames.frame(frames.HEADERS, _END, self.stream_id, trailers)
        self._connection.send(self, stream_id.join(_HEADERS_FRAME), prefix, outcome, final_frames)

    async def _run_stream(self, handler: StreamHandler) -> None:
        try:
            await handler(self)
        except Exception as error:
            self._pending = None
            self.fail(self._connection.status_of(error))
        else:
            self.send_initial_metadata()
            if self._connection.is_open(self):
                self._finish(_OK_TRAILERS + encode(encode_metadata(self.trailing_metadata)))


@functools.lru_cache(maxsize=16)
def _status(code: str) -> bytes:
    return str(status_code(code)).encode()


def _error_trailers(code: str, message: str, trailing: Metadata) -> bytes:
    status = [(b"grpc-status", _status(code)), (b"grpc-message", percent_encode(message)[: MAX_STATUS_BYTES // 2])]
    trailers = encode([*status, *encode_metadata(trailing)])
    return trailers if len(trailers) <= MAX_STATUS_BYTES else encode(status)
