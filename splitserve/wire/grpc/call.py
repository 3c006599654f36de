"""One call at a server: the messages that come, the answer that goes, and what serves it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from splitserve.wire.grpc.messages import (
    ACCEPTED,
    CONTENT_TYPE,
    PREFIX,
    CallError,
    MessageReader,
    Metadata,
    encode_metadata,
    encode_text,
    prefix_of,
    status_code,
)
from splitserve.wire.grpc.request import Request
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import Stream
from splitserve.wire.http2.headers import NO_TABLE, encode
from splitserve.wire.pending import Cancellable

if TYPE_CHECKING:
    from splitserve.wire.grpc.server import ServerConnection

MAX_STATUS_BYTES = 8 * 1024
"""Of what tells of an error. Without its details, which come last, it is still told."""

Unary = Callable[[bytes, "Call"], Awaitable[bytes]]
"""Answers one message with one."""


Begin = Callable[[bytes, "Call", Callable[[bytes | Exception], None]], Cancellable]
"""The same without a task: what it is given is told of the answer, or of the error, later. May raise at once."""

Streaming = Callable[["Call"], Awaitable[None]]
"""Reads messages from the call and writes others to it; the call ends as it returns."""


class Method(msgspec.Struct, frozen=True):
    """What serves a method: one of the three; of the first two ``begin``, if there is one."""

    unary: Unary | None = None
    begin: Begin | None = None
    streaming: Streaming | None = None


class Reservation(Protocol):
    """The bytes that one call has reserved of all that may be in flight."""

    def reserve(self, n_bytes: int) -> None:
        """Reserve more; raises what `explain` renders if the limit is exceeded."""

    def release(self) -> None:
        """The call is over."""


_BEGIN = NO_TABLE + b"\x88" + encode([(b"content-type", CONTENT_TYPE), (b"grpc-accept-encoding", ACCEPTED)])
"""Of every answer; its second byte is ``:status 200``. Source: RFC 7541, appendix A."""

_OK = encode([(b"grpc-status", b"0")])

END_ALL = frames.END_HEADERS | frames.END_STREAM


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
        "_reservation",
        "_waiting",
        "has_ended",
        "trailing",
    )

    def __init__(self, connection: ServerConnection, number: int, window: int, request: Request, method: Method) -> None:
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
        self._reservation: Reservation | None = None
        self._pending: Cancellable | None = None
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
            self._connection.write(frames.frame(frames.HEADERS, frames.END_HEADERS, self.number, block))

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
            if self._reservation is None:
                self._reservation = self._connection.new_reservation()
                n_bytes = max(0, n_bytes - PREFIX.size)
            self._reservation.reserve(n_bytes)
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

    def tick(self, now: float) -> None:
        """End it if its time is over."""
        if self._deadline is not None and now > self._deadline:
            self.fail(CallError("DEADLINE_EXCEEDED", "out of time before the answer came"))

    def release(self) -> None:
        """It is over."""
        if self._reservation is not None:
            self._reservation.release()

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
        self._finish(frames.frame(frames.HEADERS, END_ALL, self.number, trailers))

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
        before = frames.frame(frames.HEADERS, frames.END_HEADERS, self.number, _BEGIN)
        trailers = _OK if not self.trailing else _OK + encode(encode_metadata(self.trailing))
        self._connection.send(self, before, prefix, outcome, frames.frame(frames.HEADERS, END_ALL, self.number, trailers))

    async def _stream(self, handler: Streaming) -> None:
        try:
            await handler(self)
        except Exception as error:
            self._pending = None
            self.fail(self._connection.explain(error))
        else:
            self.begin()
            if self._connection.has(self):
                self._finish(frames.frame(frames.HEADERS, END_ALL, self.number, _OK + encode(encode_metadata(self.trailing))))


@functools.lru_cache(maxsize=16)
def _status(code: str) -> bytes:
    return str(status_code(code)).encode()


def _trailers(code: str, message: str, trailing: Metadata) -> bytes:
    told = [(b"grpc-status", _status(code)), (b"grpc-message", encode_text(message)[: MAX_STATUS_BYTES // 2])]
    whole = encode([*told, *encode_metadata(trailing)])
    return whole if len(whole) <= MAX_STATUS_BYTES else encode(told)
