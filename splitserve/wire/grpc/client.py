"""A client for one long-lived stream: a connection with one call on it.

Other calls go through `grpc.aio`; this is for the stream that carries all requests between two services.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import Any

from splitserve.wire.grpc.messages import (
    ACCEPT_ENCODING,
    CONTENT_TYPE,
    CallError,
    MessageReader,
    Metadata,
    encode_metadata,
    message_prefix,
)
from splitserve.wire.grpc.response import ResponseHeaders, parse_response_headers
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import TICK_INTERVAL_S, Http2Connection, Http2Stream
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.frames import PREFACE
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, HeaderDecoder, HeaderListTooLarge, encode

KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S = 2.0, 2.0
"""Between our own services a peer that is gone is noticed within seconds, so that its calls are retried elsewhere in time."""

MAX_METADATA_BYTES = 16 * 1024

_STREAM_ID = 1
_ADDRESS = re.compile(r"ipv[46]:(?P<host>\[[0-9a-fA-F:.]+\]|[0-9.]+):(?P<port>[0-9]+)|unix:(?://)?(?P<path>.+)")


class Address:
    """The address in a gRPC target that names a single one.

    Args:
        target: ``ipv4:…``, ``ipv6:[…]:…`` or ``unix:…``.

    Raises:
        ValueError: it names none, or several (``dns:``, ``xds:`` …).
    """

    def __init__(self, target: str) -> None:
        match = _ADDRESS.fullmatch(target)
        if match is None:
            raise ValueError(f"{target} is not the name of one address")
        self.path: str | None = match["path"]
        self.host = (match["host"] or "localhost").strip("[]")
        self.port = int(match["port"] or 0)


class StreamCall(Http2Connection):
    """One call to a method that streams both ways, from `open_stream` until it ends.

    Args:
        on_message: called with each message received.
        max_message_bytes: limit of messages, sent and received.
    """

    _MAX_ENABLE_PUSH = 0

    def __init__(self, on_message: Callable[[bytes], None], max_message_bytes: int) -> None:
        super().__init__(keepalive_time_s=KEEPALIVE_TIME_S, keepalive_timeout_s=KEEPALIVE_TIMEOUT_S)
        self._on_message = on_message
        self._max_message_bytes = max_message_bytes
        self._headers: HeaderDecoder[ResponseHeaders] = HeaderDecoder(parse_response_headers, MAX_METADATA_BYTES)
        self._messages = MessageReader(max_message_bytes)
        self._stream = Http2Stream(_STREAM_ID, frames.DEFAULT_WINDOW)
        self.initial_metadata: asyncio.Future[dict[bytes, bytes]] = self._loop.create_future()
        """The server's response headers; the status as an exception if the call ends without them."""
        self.status: asyncio.Future[CallError] = self._loop.create_future()
        """How the call ended; OK is an error with that code."""
        self.goaway = asyncio.Event()
        """Set when the server accepts no more calls on this connection. The call in flight continues."""

    def start(self, method: str, authority: str, scheme: str, metadata: Metadata) -> None:
        """Open the stream."""
        self._send_preface(PREFACE, {frames.ENABLE_PUSH: 0})
        self._streams[_STREAM_ID] = self._stream
        block = TABLE_SIZE_ZERO + encode(
            [
                (b":method", b"POST"),
                (b":scheme", scheme.encode()),
                (b":path", method.encode()),
                (b":authority", authority.encode()),
                (b"te", b"trailers"),
                (b"content-type", CONTENT_TYPE),
                (b"grpc-accept-encoding", ACCEPT_ENCODING),
                *encode_metadata(metadata),
            ]
        )
        self._write_soon(frames.frame(frames.HEADERS, frames.END_HEADERS, _STREAM_ID, block))

    def write(self, message: bytes) -> None:
        """Send a message.

        Raises:
            CallError: it exceeds the limit of messages, or the call has ended.
        """
        prefix = message_prefix(message, self._max_message_bytes)
        if self.status.done():
            raise CallError("UNAVAILABLE", "the call has ended")
        self.send(self._stream, b"", prefix, message)

    def half_close(self) -> None:
        """Send nothing more. What is in flight is still answered."""
        if not self.status.done():
            self.end_stream(self._stream, frames.frame(frames.DATA, frames.END_STREAM, _STREAM_ID))

    def cancel(self) -> None:
        """End the call at once."""
        if not self.status.done():
            self.reset_stream(self._stream, frames.CANCEL)
            self._finish(CallError("CANCELLED", "the call was cancelled"))

    async def keep_ticking(self) -> None:
        """Apply keepalive until the call has ended."""
        while not self.status.done():
            await asyncio.wait([self.status], timeout=TICK_INTERVAL_S)
            self.tick(self.now())

    # For the connection.

    def _finish(self, status: CallError) -> None:
        if not self.status.done():
            self.status.set_result(status)
            if not self.initial_metadata.done():
                self.initial_metadata.set_exception(status)
                self.initial_metadata.exception()  # marks it as retrieved, since nothing may be awaiting it
            self.close()

    def _end_sent(self, stream: Any) -> None:
        """The server's side of the stream is still open."""

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id != _STREAM_ID

    def _settings_acknowledged(self) -> None:
        self._headers.disable_dynamic_table()

    def _headers_received(self, stream_id: int, block: bytes, end_stream: bool) -> None:
        if stream_id != _STREAM_ID:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "HEADERS on a stream that was not opened")
        try:
            headers = self._headers.decode(block)
        except HeaderListTooLarge:
            self._finish(CallError("RESOURCE_EXHAUSTED", f"response metadata exceeds {MAX_METADATA_BYTES} bytes"))
            return
        has_headers = self.initial_metadata.done()
        if headers.is_malformed or has_headers == bool(headers.http_status) or (has_headers and not end_stream):
            self._stream_error(stream_id, frames.PROTOCOL_ERROR, "malformed response headers")
        elif end_stream:
            self._finish(headers.status())
        elif headers.is_informational:
            pass
        elif headers.http_status != b"200":
            self._finish(headers.status())
        else:
            self._stream.body_left = headers.content_length
            self.initial_metadata.set_result(headers.fields)

    def _data_received(self, stream: Http2Stream, data: bytes, end_stream: bool) -> None:
        if not self.initial_metadata.done():
            self._stream_error(stream.stream_id, frames.PROTOCOL_ERROR, "DATA before the response headers")
            return
        self._messages.feed(data)
        self._count_progress()
        try:
            while (message := self._messages.take()) is not None:
                self._on_message(message)
        except CallError as error:
            self._finish(error)
            return
        if end_stream:
            self._finish(CallError("INTERNAL", "the stream ended without a status"))
        else:
            self.acknowledge(stream, len(data))

    def _stream_aborted(self, stream: Any, code: int, message: str) -> None:
        self._finish(CallError("UNAVAILABLE", message))

    def _goaway_received(self, last_stream_id: int) -> None:
        self.goaway.set()
        if last_stream_id < _STREAM_ID:
            self._finish(CallError("UNAVAILABLE", "the server accepts no calls"))

    def _connection_lost(self) -> None:
        self._finish(CallError("UNAVAILABLE", "connection lost"))


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
    """Connect, and open a call.

    Args:
        address: of the server.
        method: the path of the method.
        on_message: called with each message received.
        authority: the value of ``:authority``.
        max_message_bytes: limit of messages, sent and received.
        metadata: sent with the request headers.
        context: of TLS; None: plain text.
        server_name: that the certificate must carry.

    Raises:
        OSError: the server cannot be reached, or its certificate is not trusted.
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
