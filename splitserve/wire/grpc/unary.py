"""A client connection for unary calls, many at once: each is one message and its answer."""

from __future__ import annotations

import math
from collections.abc import Callable

from splitserve.wire.grpc.messages import (
    ACCEPT_ENCODING,
    CONTENT_TYPE,
    CallError,
    MessageReader,
    Metadata,
    compress,
    decode_metadata,
    encode_metadata,
    encode_timeout,
    message_prefix,
)
from splitserve.wire.grpc.response import ResponseHeaders, parse_response_headers
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import EventLoop, Http2Connection, Http2Stream
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, HeaderDecoder, HeaderListTooLarge, encode

MAX_METADATA_BYTES = 64 * 1024
"""Of a response."""

_RESET_CODES = {
    frames.REFUSED_STREAM: "UNAVAILABLE",
    frames.CANCEL: "CANCELLED",
    frames.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED",
}
"""Source: gRPC, doc/PROTOCOL-HTTP2.md, Errors."""

_HTTP_CODES = {
    b"400": "INTERNAL",
    b"401": "UNAUTHENTICATED",
    b"403": "PERMISSION_DENIED",
    b"404": "UNIMPLEMENTED",
    b"429": "UNAVAILABLE",
    b"502": "UNAVAILABLE",
    b"503": "UNAVAILABLE",
    b"504": "UNAVAILABLE",
}
"""Source: gRPC, doc/http-grpc-status-mapping.md."""

_OK = b"0"


class ConnectionBroken(CallError):
    """The connection ended before the call did, or accepts no further calls."""

    def __init__(self, message: str) -> None:
        super().__init__("UNAVAILABLE", message)


class UnaryCall(Http2Stream):
    """A call in flight. ``is_begun``: a response had begun. ``message``: of an answer that succeeded."""

    __slots__ = ("is_begun", "is_sent", "message", "messages", "on_end")

    def __init__(self, stream_id: int, send_window: int, on_end: Callable[[UnaryCall, CallError | None], None]) -> None:
        super().__init__(stream_id, send_window)
        self.on_end = on_end
        self.is_begun = self.is_sent = False
        self.messages: MessageReader | None = None
        self.message: bytes | None = None


class UnaryConnection(Http2Connection):
    """The connection, from `start` until `is_usable` is false and its last call has ended.

    Args:
        authority: the value of ``:authority``.
        scheme: ``http`` or ``https``.
        max_message_bytes: limit of messages, sent and received.
        on_change: called when `is_usable` or the number of calls in flight has changed by what the server did.
        keepalive_time_s: a PING is sent to a server that has been silent for so long. `tick` is to be called then.
        keepalive_timeout_s: for its answer.
        loop: None: the running event loop.
    """

    _MAX_ENABLE_PUSH = 0

    def __init__(
        self,
        authority: str,
        scheme: str,
        max_message_bytes: int,
        *,
        on_change: Callable[[], None] = lambda: None,
        keepalive_time_s: float = math.inf,
        keepalive_timeout_s: float = 20.0,
        loop: EventLoop | None = None,
    ) -> None:
        super().__init__(keepalive_time_s=keepalive_time_s, keepalive_timeout_s=keepalive_timeout_s, loop=loop)
        self._authority, self._scheme = authority.encode(), scheme.encode()
        self._max_message_bytes = max_message_bytes
        self._on_change = on_change
        self._headers: HeaderDecoder[ResponseHeaders] = HeaderDecoder(parse_response_headers, MAX_METADATA_BYTES)
        self._heads: dict[str, bytes] = {}
        """The headers that all calls of a method have."""
        self._next_stream_id = 1
        self._is_going_away = False
        self._why = ""
        """Why the connection was closed."""
        self._lost_by: Exception | None = None
        self.is_lost = False
        """Whether the transport is closed."""
        self.max_calls: float = math.inf
        """In flight at once, as the server allows it."""

    @property
    def is_usable(self) -> bool:
        """Whether another call can be made."""
        return not (self._is_going_away or self._closing_since or self._next_stream_id >= frames.MAX_STREAM_ID)

    @property
    def is_ready(self) -> bool:
        """Whether the server has sent its settings, so that it speaks HTTP/2."""
        return self._has_settings

    @property
    def n_calls(self) -> int:
        """In flight."""
        return len(self._streams)

    def broken(self) -> ConnectionBroken:
        """The error of calls on a connection that is no longer usable."""
        broken = ConnectionBroken(self._why or "it closed the connection")
        broken.__cause__ = self._lost_by
        return broken

    def start(self) -> None:
        """Send the connection preface."""
        self._send_preface(frames.PREFACE, {frames.ENABLE_PUSH: 0})

    def call(
        self,
        method: str,
        metadata: Metadata,
        message: bytes,
        on_end: Callable[[UnaryCall, CallError | None], None],
        *,
        timeout_s: float = math.inf,
        is_compressed: bool = False,
    ) -> UnaryCall:
        """Begin a call of a connection that `is_usable`; ``on_end`` is called once, with the error if it failed.

        Args:
            method: its path.
            metadata: sent with the request headers.
            message: the request.
            on_end: see above.
            timeout_s: told to the server. Keeping it is the caller's task.
            is_compressed: whether the message is sent compressed.

        Raises:
            CallError: the message exceeds the limit.
        """
        prefix = message_prefix(message, self._max_message_bytes)
        if is_compressed:
            prefix, message = compress(message)
        call = UnaryCall(self._next_stream_id, self._initial_send_window, on_end)
        fields = encode_metadata(metadata)
        if is_compressed:
            fields.append((b"grpc-encoding", b"gzip"))
        if timeout_s < math.inf:
            fields.append((b"grpc-timeout", encode_timeout(timeout_s)))
        block = self._head(method) + encode(fields)
        if self._next_stream_id == 1:
            block = TABLE_SIZE_ZERO + block
        self._next_stream_id += 2
        self._streams[call.stream_id] = call
        headers = self._header_frames(call.stream_id, block)
        self.send(call, headers, prefix, message, frames.frame(frames.DATA, frames.END_STREAM, call.stream_id))
        return call

    def cancel(self, call: UnaryCall) -> None:
        """Abort a call, whose ``on_end`` is then not called."""
        if self.is_open(call):
            self.reset_stream(call, frames.CANCEL)
            self._close_if_done()

    def _head(self, method: str) -> bytes:
        head = self._heads.get(method)
        if head is None:
            head = self._heads[method] = encode(
                [
                    (b":method", b"POST"),
                    (b":scheme", self._scheme),
                    (b":path", method.encode()),
                    (b":authority", self._authority),
                    (b"te", b"trailers"),
                    (b"content-type", CONTENT_TYPE),
                    (b"grpc-accept-encoding", ACCEPT_ENCODING),
                ]
            )
        return head

    def _header_frames(self, stream_id: int, block: bytes) -> bytes:
        """HEADERS, and CONTINUATION of what exceeds the peer's frames."""
        size = self._max_send_frame
        if len(block) <= size:
            return frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, block)
        parts = [block[at : at + size] for at in range(0, len(block), size)]
        framed = [frames.frame(frames.HEADERS, 0, stream_id, parts[0])]
        framed += [frames.frame(frames.CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
        return b"".join([*framed, frames.frame(frames.CONTINUATION, frames.END_HEADERS, stream_id, parts[-1])])

    def _end(self, call: UnaryCall, error: CallError | None) -> None:
        """A call has ended. What was not sent of it is given up."""
        if self.is_open(call):
            if call.is_sent and call.remote_closed:
                self._remove_stream(call)
            else:
                self.reset_stream(call, frames.NO_ERROR if call.remote_closed else frames.CANCEL)
        if error is None:
            self._count_progress()
        call.on_end(call, error)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_going_away and not self._streams:
            self.close()
        self._on_change()

    # For the connection.

    def data_received(self, data: bytes) -> None:
        if not self._has_settings and (self._unparsed + data[:5]).startswith(b"HTTP/"):
            self._why = "http1: it answers in HTTP/1.1"
            self._is_going_away = True
            self.abort()
            return
        was_ready = self._has_settings
        super().data_received(data)
        if not was_ready and self._has_settings:
            self._on_change()

    def connection_lost(self, exc: Exception | None) -> None:
        calls: list[UnaryCall] = list(self._streams.values())
        super().connection_lost(exc)
        self.is_lost, self._lost_by = True, exc
        for call in calls:
            call.on_end(call, self.broken())
        self._on_change()

    def close(self, code: int = frames.NO_ERROR, message: str = "") -> None:
        self._why = self._why or message
        super().close(code, message)

    def _apply_setting(self, setting: int, value: int) -> None:
        super()._apply_setting(setting, value)
        if setting == frames.MAX_CONCURRENT_STREAMS:
            self.max_calls = value

    def _end_sent(self, stream: UnaryCall) -> None:
        stream.is_sent = True

    def _is_idle(self, stream_id: int) -> bool:
        return not stream_id & 1 or stream_id >= self._next_stream_id

    def _settings_acknowledged(self) -> None:
        self._headers.disable_dynamic_table()

    def _headers_received(self, stream_id: int, block: bytes, end_stream: bool) -> None:
        try:
            headers = self._headers.decode(block)
        except HeaderListTooLarge:
            headers = None
        call: UnaryCall | None = self._streams.get(stream_id)
        if call is None:
            if self._is_idle(stream_id):
                raise Http2ConnectionError(frames.PROTOCOL_ERROR, "HEADERS on a stream that was not opened")
            self._frame_on_closed_stream(stream_id)
            return
        call.remote_closed = end_stream
        if headers is None:
            self._end(call, CallError("RESOURCE_EXHAUSTED", f"response metadata exceeds {MAX_METADATA_BYTES} bytes"))
        elif headers.is_malformed or (call.is_begun and (bool(headers.http_status) or not end_stream)):
            self._end(call, CallError("INTERNAL", "malformed response headers"))
        elif end_stream:
            call.is_begun = True
            self._end(call, _status(call, headers))
        elif not headers.is_informational:
            call.is_begun = True
            error = _not_grpc(headers)
            if error is not None:
                self._end(call, error)
                return
            encoding = headers.fields.get(b"grpc-encoding", b"").replace(b"identity", b"")
            call.messages = MessageReader(self._max_message_bytes, encoding)
            call.body_left = headers.content_length

    def _data_received(self, stream: UnaryCall, data: bytes, end_stream: bool) -> None:
        if stream.messages is None:
            self._stream_error(stream.stream_id, frames.PROTOCOL_ERROR, "DATA before the response headers")
            return
        stream.messages.feed(data)
        try:
            if stream.message is None:
                stream.message = stream.messages.take()
        except CallError as error:
            self._end(stream, error)
            return
        if end_stream:
            self._end(stream, CallError("INTERNAL", "the stream ended without a status"))
        else:
            self.acknowledge(stream, len(data))

    def _stream_aborted(self, stream: UnaryCall, code: int, message: str) -> None:
        self._end(stream, CallError(_RESET_CODES.get(code, "INTERNAL"), message))

    def _goaway_received(self, last_stream_id: int) -> None:
        self._is_going_away = True
        for call in [call for number, call in self._streams.items() if number > last_stream_id]:
            self._remove_stream(call)
            call.on_end(call, ConnectionBroken("it accepts no more calls"))
        self._close_if_done()


def _status(call: UnaryCall, headers: ResponseHeaders) -> CallError | None:
    """How a call ended by its last headers; None: it succeeded."""
    status = headers.fields.get(b"grpc-status")
    if status == _OK:
        return None if call.message is not None else CallError("INTERNAL", "the response has no message")
    if status is None:
        return _not_grpc(headers) or CallError("UNKNOWN", "the response has no status")
    error = headers.status()
    error.trailing = decode_metadata(headers.fields.items())
    return error


def _not_grpc(headers: ResponseHeaders) -> CallError | None:
    """The error of response headers that are not gRPC's."""
    if headers.http_status and headers.http_status != b"200":
        text = f"HTTP status {headers.http_status.decode(errors='replace')}"
        return CallError(_HTTP_CODES.get(headers.http_status, "UNKNOWN"), text)
    content_type = headers.fields.get(b"content-type", b"")
    if headers.http_status and not content_type.startswith(CONTENT_TYPE):
        return CallError("UNKNOWN", f"content-type {content_type.decode(errors='replace')[:100] or 'missing'}")
    return None
