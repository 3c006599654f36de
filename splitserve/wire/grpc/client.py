"""The client's end of one long-lived stream: a connection of its own, with one call on it.

Calls that come and go are `grpc.aio`'s business; this is for what carries every request between two services.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import Any

from splitserve.wire.grpc.messages import (
    ACCEPTED,
    CONTENT_TYPE,
    CallError,
    MessageReader,
    Metadata,
    decode_text,
    encode_metadata,
    prefix_of,
    status_name,
)
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import LOOK_INTERVAL_S, Connection, Stream
from splitserve.wire.http2.frames import PREFACE
from splitserve.wire.http2.headers import NO_TABLE, HeaderDecoder, Headers, TooManyHeaders, encode

SILENT_S = 2.0
"""A server that has been silent for so long is asked for a sign of life."""

MAX_METADATA_BYTES = 16 * 1024

_NUMBER = 1
_ADDRESS = re.compile(r"ipv[46]:(?P<host>\[[0-9a-fA-F:.]+\]|[0-9.]+):(?P<port>[0-9]+)|unix:(?://)?(?P<path>.+)")


class Address:
    """Where a gRPC name leads, if it is that of one address.

    Args:
        target: ``ipv4:…``, ``ipv6:[…]:…`` or ``unix:…``.

    Raises:
        ValueError: it is another one.
    """

    def __init__(self, target: str) -> None:
        match = _ADDRESS.fullmatch(target)
        if match is None:
            raise ValueError(f"{target} is not the name of one address")
        self.path: str | None = match["path"]
        self.host = (match["host"] or "localhost").strip("[]")
        self.port = int(match["port"] or 0)


class StreamCall(Connection):
    """One call to a method that streams both ways, from `open_stream` until it ends.

    Args:
        on_message: gets each message that comes.
        max_message_bytes: the largest that is sent or taken.
    """

    def __init__(self, on_message: Callable[[bytes], None], max_message_bytes: int) -> None:
        super().__init__(silent_s=SILENT_S)
        self._on_message = on_message
        self._max_message_bytes = max_message_bytes
        self._headers: HeaderDecoder[dict[bytes, bytes]] = HeaderDecoder(_by_name, MAX_METADATA_BYTES)
        self._messages = MessageReader(max_message_bytes)
        self._stream = Stream(_NUMBER, frames.DEFAULT_WINDOW)
        self.answered: asyncio.Future[dict[bytes, bytes]] = self._loop.create_future()
        """The server's initial metadata."""
        self.ended: asyncio.Future[CallError] = self._loop.create_future()
        """How the call ended; an OK is an error with that code."""
        self.is_asked_to_leave = asyncio.Event()
        """The server takes no more calls on this connection; what is under way is answered."""

    def start(self, method: str, authority: str, scheme: str, metadata: Metadata) -> None:
        """Open the stream."""
        self._greet(PREFACE, {frames.ENABLE_PUSH: 0})
        self._streams[_NUMBER] = self._stream
        block = NO_TABLE + encode(
            [
                (b":method", b"POST"),
                (b":scheme", scheme.encode()),
                (b":path", method.encode()),
                (b":authority", authority.encode()),
                (b"te", b"trailers"),
                (b"content-type", CONTENT_TYPE),
                (b"grpc-accept-encoding", ACCEPTED),
                *encode_metadata(metadata),
            ]
        )
        self._put(frames.frame(frames.HEADERS, frames.END_HEADERS, _NUMBER, block))

    def write(self, message: bytes) -> None:
        """Send a message.

        Raises:
            CallError: it is larger than it may be, or the call is over.
        """
        prefix = prefix_of(message, self._max_message_bytes)
        if self.ended.done():
            raise CallError("UNAVAILABLE", "the call is over")
        self.send(self._stream, b"", prefix, message)

    def finish(self) -> None:
        """Send nothing more; what is under way is still answered."""
        if not self.ended.done():
            self._stream.tail = frames.frame(frames.DATA, frames.END_STREAM, _NUMBER)
            if not self._stream.backlog:
                self._put(self._stream.tail)

    def cancel(self) -> None:
        """End it at once."""
        if not self.ended.done():
            self.reset(self._stream, frames.CANCEL)
            self._finish(CallError("CANCELLED", "the call was cancelled"))

    async def live(self) -> None:
        """Look after it until it has ended."""
        while not self.ended.done():
            await asyncio.wait([self.ended], timeout=LOOK_INTERVAL_S)
            self.tick(self._loop.time())

    # For the connection.

    def _finish(self, error: CallError) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
            if not self.answered.done():
                self.answered.set_exception(error)
                self.answered.exception()  # whoever waited for it has been told
            self.close()

    def _sent(self, stream: Any) -> None:
        """All is sent; the peer's part is still to come."""

    def _is_past(self, stream: int) -> bool:
        return stream == _NUMBER

    def _settings_agreed(self) -> None:
        self._headers.forbid_table()

    def _take_block(self, stream: int, block: bytes, is_end: bool) -> None:
        try:
            headers = self._headers.decode(block)
        except TooManyHeaders:
            headers = {}
            is_end = True
        if is_end:
            self._finish(_status(headers))
        elif not self.answered.done():
            self.answered.set_result(headers)

    def _take_content(self, stream: Stream, content: bytes, is_end: bool) -> None:
        self._messages.feed(content)
        self._noise = 0
        try:
            while (message := self._messages.take()) is not None:
                self._on_message(message)
        except CallError as error:
            self._finish(error)
            return
        if is_end:
            self._finish(CallError("INTERNAL", "the stream ended without a status"))
        else:
            self.give_room(stream, len(content))

    def _take_reset(self, stream: Any, code: int) -> None:
        self._finish(CallError("UNAVAILABLE", f"the stream was reset with code {code}"))

    def _take_goodbye(self, last_stream: int) -> None:
        self.is_asked_to_leave.set()
        if last_stream < _NUMBER:
            self._finish(CallError("UNAVAILABLE", "the server takes no calls"))

    def _end(self) -> None:
        self._finish(CallError("UNAVAILABLE", "the connection is gone"))


def _by_name(headers: Headers) -> dict[bytes, bytes]:
    return dict(headers)


def _status(headers: dict[bytes, bytes]) -> CallError:
    if b"grpc-status" not in headers:
        return CallError("UNAVAILABLE", f"HTTP status {headers.get(b':status', b'?').decode(errors='replace')[:8]}")
    return CallError(status_name(headers[b"grpc-status"]), decode_text(headers.get(b"grpc-message", b"")))


async def open_stream(
    address: Address,
    method: str,
    on_message: Callable[[bytes], None],
    *,
    authority: str,
    max_message_bytes: int,
    metadata: Metadata = (),
    context: ssl.SSLContext | None = None,
    server_name: str = "",
) -> StreamCall:
    """Connect, and begin a call.

    Args:
        address: of the server.
        method: its path.
        on_message: gets each message.
        authority: the name that the server is called by.
        max_message_bytes: the largest that is sent or taken.
        metadata: sent as the call begins.
        context: of TLS; None: plain text.
        server_name: that the certificate must have.

    Raises:
        OSError: it cannot be reached, or not be trusted.
    """
    loop = asyncio.get_running_loop()
    name = server_name or None if context else None

    def make() -> StreamCall:
        return StreamCall(on_message, max_message_bytes)

    if address.path is not None:
        _, call = await loop.create_unix_connection(make, address.path, ssl=context, server_hostname=name)
    else:
        _, call = await loop.create_connection(make, address.host, address.port, ssl=context, server_hostname=name)
    call.start(method, authority, "https" if context else "http", metadata)
    return call
