"""One endpoint of an HTTP/2 connection: frames in and out, flow control both ways, keepalive, limits on what the peer may cost.

Everything is a plain call in the event loop: what was received is handled before the next bytes are looked at. A message goes out
as one write if the peer's windows allow it, else frame by frame as the peer sends WINDOW_UPDATE.

Source: RFC 9113. tests/wire/test_rfc9113.py has its rules, one by one; docs/wire.md says which are deliberately not kept.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from splitserve.wire.addresses import peer_address
from splitserve.wire.http2 import frames
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.frames import FRAME_HEADER, FRAME_HEADER_SIZE

STREAM_WINDOW = 4 * 1024 * 1024
"""Our receive window for a stream: bytes that may arrive before they are consumed."""

CONNECTION_WINDOW = 16 * 1024 * 1024
"""Our receive window for all streams together. It is returned as bytes arrive, so that no stream can block another."""

FRAME_SIZE = 1024 * 1024
"""The largest frame that we accept and send. DATA is delivered as it arrives, complete or not."""

MAX_HEADER_BLOCK_BYTES = 256 * 1024
"""Larger header blocks end the connection. Blocks up to this size are decoded, even if their stream fails, to keep the
compression state. Source: section 10.5.1."""

MAX_CONTINUATIONS = 64
"""Frames of a header block."""

MAX_CONTROL_FRAMES = 4_000
"""Frames between two ticks that make no request progress: PING, SETTINGS, PRIORITY, RST_STREAM, unknown and empty frames, and
WINDOW_UPDATE beyond `BYTES_PER_WINDOW_UPDATE`. Source: section 10.5; CVE-2019-9511 to 9518."""

BYTES_PER_WINDOW_UPDATE = 1024
"""One WINDOW_UPDATE for this many recently sent bytes is legitimate, on any stream. Peers send one or two for each
DATA frame of 16 KiB."""

MAX_ABORTED_STREAMS = 2_000
"""Streams between two ticks that the peer opens and resets, or makes us reset, beyond those that are answered.
Source: CVE-2023-44487 ("rapid reset"), CVE-2025-8671 ("made you reset")."""

MAX_REMEMBERED_RESETS = 1_000
"""Streams that ended by RST_STREAM and are remembered, to decide what may still arrive on them."""

TINY_DATA_BYTES = 256
"""DATA on a closed stream that is smaller counts as a control frame; larger DATA is limited by flow control."""

TICK_INTERVAL_S = 1.0
"""How often `tick` is to be called."""

CLOSE_TIMEOUT_S = 5.0
"""How long the peer may take to read what was written before the connection was closed."""

_LARGE_BYTES = 64 * 1024
"""Larger payloads are written without being copied after their frame header."""

_KEEPALIVE_PING, _DRAIN_PING = b"alive?\0\0", b"drained\0"


class Http2Stream:
    """One stream: its flow-control windows, and what is queued to be sent on it."""

    __slots__ = (
        "body_left",
        "final_frames",
        "recv_window",
        "remote_closed",
        "send_queue",
        "send_waiter",
        "send_window",
        "stream_id",
        "unreturned",
    )

    def __init__(self, stream_id: int, send_window: int) -> None:
        self.stream_id = stream_id
        self.send_window = send_window
        self.recv_window = STREAM_WINDOW
        self.unreturned = 0
        """Consumed bytes that no WINDOW_UPDATE has returned yet."""
        self.remote_closed = False
        """Whether the peer has sent END_STREAM."""
        self.body_left = -1
        """Bytes that are still to come by Content-Length; -1: unknown."""
        self.send_queue: deque[memoryview] = deque()
        """DATA payload that waits for the peer's windows."""
        self.final_frames = b""
        """Frames after the queue, the last of which has END_STREAM."""
        self.send_waiter: asyncio.Future[None] | None = None
        """Resolved when the queue is sent, or the stream is gone."""


class EventLoop(Protocol):
    """What a connection needs of an event loop: asyncio's, or that of a blocking caller."""

    def time(self) -> float:
        """The monotonic clock."""
        ...

    def call_soon(self, callback: Callable[[], Any]) -> Any:
        """Call back once what was received has been handled."""
        ...

    def create_future(self) -> asyncio.Future[Any]:
        """For those that wait on an event loop."""
        ...


class Http2Connection(asyncio.Protocol):
    """What client and server have in common. A subclass gives headers, data and the end of a stream their meaning.

    Args:
        keepalive_time_s: a PING is sent to a peer that has been silent for so long.
        keepalive_timeout_s: the connection is aborted if nothing is received for so long after that PING.
        loop: what has the clock and calls back; None: the running event loop.
    """

    _transport: Any  # asyncio's or uvloop's, plain or TLS

    def __init__(
        self, *, keepalive_time_s: float = math.inf, keepalive_timeout_s: float = 20.0, loop: EventLoop | None = None
    ) -> None:
        self._loop: EventLoop = loop or asyncio.get_running_loop()
        self.now: Callable[[], float] = self._loop.time
        self.create_future: Callable[[], asyncio.Future[Any]] = self._loop.create_future
        self._keepalive_time_s = keepalive_time_s
        self._keepalive_timeout_s = keepalive_timeout_s

        # Streams.
        self._streams: dict[int, Any] = {}
        """Those that can send or be sent something, by id."""
        self._last_stream_id = 0
        """The highest id of a stream that the peer has opened and we have processed; sent in GOAWAY."""
        self._resets: dict[int, bool] = {}
        """Streams that recently ended by RST_STREAM, the oldest first; whether we sent it."""
        self._last_forgotten_reset = 0
        """The highest id that was removed from `_resets` because it was full."""

        # Receiving: what a read left over, and where in a frame or header block it ended.
        self._unparsed = b""
        """The beginning of a frame that is not complete."""
        self._data_left = 0
        """Payload of the current DATA frame that is still to arrive."""
        self._discard_left = 0
        """Bytes to discard after it: padding, DATA of closed streams, unknown frames."""
        self._data_stream_id = 0
        self._data_ends_stream = False
        self._block: list[bytes] = []
        """Fragments of the header block that is arriving."""
        self._block_size = 0
        self._block_stream_id = 0
        """The stream of that block; 0: none is arriving. Until its end only CONTINUATION is allowed. Source: section 6.10."""
        self._block_ends_stream = False
        self._has_settings = False
        """Whether the peer's SETTINGS have arrived, which must be its first frame."""
        self._recv_window: int = CONNECTION_WINDOW
        self._unreturned = 0
        """Received bytes that no WINDOW_UPDATE for the connection has returned yet."""

        # Sending.
        self._send_window: int = frames.DEFAULT_WINDOW
        """What the peer's connection window allows."""
        self._send_window_granted: int = frames.DEFAULT_WINDOW
        """All that it ever allowed; less `_send_window` it is what was sent."""
        self._initial_send_window: int = frames.DEFAULT_WINDOW
        """Of a new stream: the peer's SETTINGS_INITIAL_WINDOW_SIZE."""
        self._max_send_frame: int = frames.DEFAULT_FRAME_SIZE
        self._blocked: dict[Http2Stream, None] = {}
        """Streams with a send queue, in the order in which they get their turn."""
        self._unwritten: list[bytes | memoryview] = []
        """Frames of this iteration of the event loop, written together at its end."""
        self._is_write_paused = False
        """Whether the transport's buffer is full."""

        # Limits.
        self._control_frames = 0
        """Since the last tick, or the last progress of a request; see `MAX_CONTROL_FRAMES`."""
        self._aborted_streams = 0
        """Since the last tick; see `MAX_ABORTED_STREAMS`."""
        self._window_updates = 0
        """Since the last tick."""
        self._sent_at_ticks = (0, 0)
        """Bytes sent until the last tick but one, and until the last."""

        # Keepalive and closing.
        self._was_heard = False
        """Whether anything was received since the last tick."""
        self._heard_at = self.now()
        self._pinged_at = 0.0
        """When the keepalive PING that is not answered was sent; 0: none."""
        self._closing_since = 0.0
        """When `close` was called, or the transport closed; 0: neither. Nothing is received or sent afterwards."""

    # What a subclass implements.

    def _headers_received(self, stream_id: int, block: bytes, end_stream: bool) -> None:
        """A whole header block. To be decoded in any case, since the compression state depends on it."""
        raise NotImplementedError

    def _data_received(self, stream: Any, data: bytes, end_stream: bool) -> None:
        """Payload of DATA on an open stream, in pieces as they arrive."""
        raise NotImplementedError

    def _stream_aborted(self, stream: Any, code: int, message: str) -> None:
        """A stream was reset, by the peer or for an error of the peer, and is gone."""
        raise NotImplementedError

    def _is_idle(self, stream_id: int) -> bool:
        """Whether neither side has opened the stream yet. Source: section 5.1."""
        raise NotImplementedError

    def _goaway_received(self, last_stream_id: int) -> None:
        """The peer will not process streams with a higher id."""

    def _connection_lost(self) -> None:
        """The transport is closed."""

    def _settings_acknowledged(self) -> None:
        """The peer applies our settings from here on."""

    def _drain_ping_acknowledged(self) -> None:
        """The peer has received what was sent before `_send_drain_ping`."""

    @property
    def peer_address(self) -> str:
        """``host:port``; "" if it has none."""
        return peer_address(self._transport)

    # Called by the transport.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing_since = self._closing_since or self.now()
        for stream in tuple(self._streams.values()):
            self._remove_stream(stream)
        self._blocked.clear()
        self._connection_lost()

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._send_queued()

    def data_received(self, data: bytes) -> None:
        if self._closing_since:
            return
        self._was_heard = True
        try:
            self._read(data)
        except Http2ConnectionError as error:
            self.close(error.code, error.message)

    # Receiving.

    def _read(self, data: bytes) -> None:
        if self._unparsed:
            data = self._unparsed + data
            self._unparsed = b""
        at, end = 0, len(data)
        while not self._closing_since:
            if self._data_left or self._discard_left:
                if at == end:
                    return
                at = self._read_payload(data, at, end)
                continue
            if end - at < FRAME_HEADER_SIZE:
                break
            high, low, frame_type, flags, stream_id = FRAME_HEADER.unpack_from(data, at)
            length = high << 8 | low
            stream_id &= frames.MAX_STREAM_ID
            if length > FRAME_SIZE:
                raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, f"frame exceeds {FRAME_SIZE} bytes")
            if frame_type == frames.DATA:
                padding = -1
                if flags & frames.PADDED and length:
                    if end - at == FRAME_HEADER_SIZE:
                        break
                    padding = data[at + FRAME_HEADER_SIZE]
                at += FRAME_HEADER_SIZE + (padding >= 0)
                self._begin_data(flags, stream_id, length, padding)
                continue
            if self._block_stream_id or not self._has_settings:
                self._check_order(frame_type, flags, stream_id)
            handler = self._HANDLERS.get(frame_type)
            if handler is None:  # an extension. Source: sections 4.1 and 5.5
                self._count_control_frame()
                at += FRAME_HEADER_SIZE
                self._discard_left = length
                continue
            if length > MAX_HEADER_BLOCK_BYTES:
                raise Http2ConnectionError(frames.ENHANCE_YOUR_CALM, f"frame payload exceeds {MAX_HEADER_BLOCK_BYTES} bytes")
            if end - at - FRAME_HEADER_SIZE < length:
                break
            at += FRAME_HEADER_SIZE + length
            handler(self, flags, stream_id, data[at - length : at])
        self._unparsed = data[at:]

    def _check_order(self, frame_type: int, flags: int, stream_id: int) -> None:
        """Only SETTINGS may be the first frame; only CONTINUATION may follow within a header block. Sections 3.4, 6.10."""
        if self._block_stream_id and (frame_type != frames.CONTINUATION or stream_id != self._block_stream_id):
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "expected CONTINUATION of the header block")
        if not self._has_settings and (frame_type != frames.SETTINGS or flags & frames.ACK):
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "expected SETTINGS as the first frame")

    def _begin_data(self, flags: int, stream_id: int, length: int, padding: int) -> None:
        """A DATA frame begins; ``padding`` is -1 without the flag PADDED. Source: section 6.1."""
        if self._block_stream_id or not self._has_settings:
            self._check_order(frames.DATA, flags, stream_id)
        end_stream = bool(flags & frames.END_STREAM)
        size = length - (1 + padding if padding >= 0 else 0)
        if not stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "DATA on stream 0")
        if size < 0 or (padding < 0 and flags & frames.PADDED):
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "padding exceeds the frame")
        self._recv_window -= length
        if self._recv_window < 0:
            raise Http2ConnectionError(frames.FLOW_CONTROL_ERROR, "flow-control window exceeded")
        self._unreturned += length
        if self._unreturned > CONNECTION_WINDOW // 2:
            self._write_soon(frames.window_update(0, self._unreturned))
            self._recv_window += self._unreturned
            self._unreturned = 0
        stream = self._streams.get(stream_id)
        self._discard_left = max(padding, 0)
        if stream is None:
            if self._is_idle(stream_id):
                raise Http2ConnectionError(frames.PROTOCOL_ERROR, "DATA on an idle stream")
            if size < TINY_DATA_BYTES:
                self._count_control_frame()
            self._discard_left += size
            self._frame_on_closed_stream(stream_id)
            return
        stream.recv_window -= length
        if stream.remote_closed or stream.recv_window < 0 or stream.body_left >= 0:
            error = self._data_error(stream, size, end_stream)
            if error is not None:
                self._discard_left += size
                self._stream_error(stream_id, *error)
                return
        if length != size:
            self.acknowledge(stream, length - size)
        self._data_left, self._data_stream_id, self._data_ends_stream = size, stream_id, end_stream
        if not size:
            self._count_control_frame()
            if end_stream:
                stream.remote_closed = True
                self._data_received(stream, b"", True)

    def _data_error(self, stream: Http2Stream, size: int, end_stream: bool) -> tuple[int, str] | None:
        """The stream error if this DATA may not come; takes it off what Content-Length says."""
        if stream.remote_closed:
            return frames.STREAM_CLOSED, "DATA after END_STREAM"
        if stream.recv_window < 0:
            return frames.FLOW_CONTROL_ERROR, "flow-control window exceeded"
        if stream.body_left >= 0:
            stream.body_left -= size
            if stream.body_left < 0 or (end_stream and stream.body_left):
                return frames.PROTOCOL_ERROR, "DATA does not match content-length"
        return None

    def _read_payload(self, data: bytes, at: int, end: int) -> int:
        """Deliver or discard the received part of a DATA frame; return the position after it."""
        if self._data_left:
            stop = min(end, at + self._data_left)
            self._data_left -= stop - at
            stream = self._streams.get(self._data_stream_id)
            if stream is not None:
                end_stream = self._data_ends_stream and not self._data_left
                if end_stream:
                    stream.remote_closed = True
                self._data_received(stream, data[at:stop], end_stream)
            return stop
        stop = min(end, at + self._discard_left)
        self._discard_left -= stop - at
        return stop

    def _handle_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "HEADERS on stream 0")
        end_stream = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS and not flags & (frames.PADDED | frames.HAS_PRIORITY):  # as most are
            self._headers_received(stream_id, payload, end_stream)
            return
        start, end = 0, len(payload)
        if flags & frames.PADDED:
            if not payload:
                raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "HEADERS without the announced pad length")
            start, end = 1, end - payload[0]
        if flags & frames.HAS_PRIORITY:
            start += 5
        if start > len(payload):
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "HEADERS without the announced priority")
        if start > end:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "padding exceeds the frame")
        self._block_stream_id, self._block_ends_stream = stream_id, end_stream
        self._extend_block(flags, payload[start:end])

    def _handle_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not self._block_stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._extend_block(flags, payload)

    def _extend_block(self, flags: int, fragment: bytes) -> None:
        self._block.append(fragment)
        self._block_size += len(fragment)
        if len(self._block) > MAX_CONTINUATIONS or self._block_size > MAX_HEADER_BLOCK_BYTES:
            raise Http2ConnectionError(frames.ENHANCE_YOUR_CALM, f"header block exceeds {MAX_HEADER_BLOCK_BYTES} bytes")
        if flags & frames.END_HEADERS:
            block, stream_id = b"".join(self._block), self._block_stream_id
            self._block, self._block_size, self._block_stream_id = [], 0, 0
            self._headers_received(stream_id, block, self._block_ends_stream)

    def _handle_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Deprecated, and ignored. Source: section 5.3.2."""
        if not stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "PRIORITY on stream 0")
        self._count_control_frame()
        if len(payload) != 5:
            if self._is_idle(stream_id):
                raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "PRIORITY: expected 5 bytes")
            self._stream_error(stream_id, frames.FRAME_SIZE_ERROR, "PRIORITY: expected 5 bytes")

    def _handle_rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != frames.UINT32.size:
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "RST_STREAM: expected 4 bytes")
        if not stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "RST_STREAM on stream 0")
        stream = self._streams.get(stream_id)
        self._count_control_frame()
        if stream is not None:
            self._count_aborted_stream()
            self._remove_stream(stream)
            self._remember_reset(stream_id, by_us=False)
            code = frames.UINT32.unpack(payload)[0]
            self._stream_aborted(stream, code, f"the stream was reset with code {code}")
        elif self._is_idle(stream_id):
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "RST_STREAM on an idle stream")

    def _handle_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % frames.SETTING.size or (flags & frames.ACK and payload):
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "malformed SETTINGS")
        self._count_control_frame(1 + (len(payload) + len(self._streams)) // 64)  # what it costs grows with both
        if flags & frames.ACK:
            self._settings_acknowledged()
            return
        self._has_settings = True
        for setting, value in frames.SETTING.iter_unpack(payload):
            self._apply_setting(setting, value)
        self._write_soon(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _apply_setting(self, setting: int, value: int) -> None:
        """Apply a setting of the peer; unknown ones are ignored. Source: section 6.5.2."""
        if setting == frames.INITIAL_WINDOW_SIZE:
            self._set_initial_send_window(value)
        elif setting == frames.MAX_FRAME_SIZE:
            if not frames.DEFAULT_FRAME_SIZE <= value <= frames.MAX_FRAME_SIZE_LIMIT:
                raise Http2ConnectionError(frames.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE out of range")
            self._max_send_frame = min(value, FRAME_SIZE)
        elif setting == frames.ENABLE_PUSH and value > self._MAX_ENABLE_PUSH:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH out of range")

    _MAX_ENABLE_PUSH: ClassVar[int] = 1
    """A client may send 0 or 1, a server 0."""

    def _set_initial_send_window(self, value: int) -> None:
        """Source: section 6.9.2: the windows of open streams change by the difference, and may become negative."""
        if value > frames.MAX_WINDOW:
            raise Http2ConnectionError(frames.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE out of range")
        change, self._initial_send_window = value - self._initial_send_window, value
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > frames.MAX_WINDOW:
                raise Http2ConnectionError(frames.FLOW_CONTROL_ERROR, "flow-control window overflows")
        self._send_queued()

    def _handle_push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise Http2ConnectionError(frames.PROTOCOL_ERROR, "PUSH_PROMISE: push is disabled")

    def _handle_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != len(_KEEPALIVE_PING):
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "PING: expected 8 bytes")
        self._count_control_frame()
        if not flags & frames.ACK:
            self._write_soon(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAIN_PING:
            self._drain_ping_acknowledged()

    def _handle_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < frames.GOAWAY_FIELDS.size:
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "GOAWAY: expected at least 8 bytes")
        self._count_control_frame()
        self._goaway_received(frames.GOAWAY_FIELDS.unpack_from(payload)[0] & frames.MAX_STREAM_ID)

    def _handle_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != frames.UINT32.size:
            raise Http2ConnectionError(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE: expected 4 bytes")
        increment = frames.UINT32.unpack(payload)[0] & frames.MAX_WINDOW
        self._window_updates += 1
        n_sent = self._send_window_granted - self._send_window - self._sent_at_ticks[0]
        if self._window_updates * BYTES_PER_WINDOW_UPDATE > n_sent:
            self._count_control_frame()
        if not stream_id:
            self._widen_connection(increment)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise Http2ConnectionError(frames.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            return
        stream.send_window += increment
        if not increment:
            self._stream_error(stream_id, frames.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        elif stream.send_window > frames.MAX_WINDOW:
            self._stream_error(stream_id, frames.FLOW_CONTROL_ERROR, "flow-control window overflows")
        else:
            while stream in self._blocked and min(stream.send_window, self._send_window) > 0 and not self._is_write_paused:
                self._send_queued_frame(stream)

    def _widen_connection(self, increment: int) -> None:
        if not increment:
            raise Http2ConnectionError(frames.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        was_exhausted = self._send_window <= 0
        self._send_window += increment
        self._send_window_granted += increment
        if self._send_window > frames.MAX_WINDOW:
            raise Http2ConnectionError(frames.FLOW_CONTROL_ERROR, "flow-control window overflows")
        if was_exhausted:  # else blocked streams wait for windows of their own
            self._send_queued()

    _HANDLERS: ClassVar[dict[int, Callable[[Any, int, int, bytes], None]]] = {
        frames.HEADERS: _handle_headers,
        frames.PRIORITY: _handle_priority,
        frames.RST_STREAM: _handle_rst_stream,
        frames.SETTINGS: _handle_settings,
        frames.PUSH_PROMISE: _handle_push_promise,
        frames.PING: _handle_ping,
        frames.GOAWAY: _handle_goaway,
        frames.WINDOW_UPDATE: _handle_window_update,
        frames.CONTINUATION: _handle_continuation,
    }

    # Stream states, and limits.

    def is_open(self, stream: Http2Stream) -> bool:
        """Whether something can still be sent on the stream."""
        return self._streams.get(stream.stream_id) is stream

    def reset_stream(self, stream: Http2Stream, code: int) -> None:
        """End a stream by RST_STREAM."""
        self._remove_stream(stream)
        self._remember_reset(stream.stream_id, by_us=True)
        self._write_soon(frames.rst_stream(stream.stream_id, code))

    def _stream_error(self, stream_id: int, code: int, message: str) -> None:
        """The peer broke a rule in a way that ends one stream. Source: section 5.4.2."""
        self._count_aborted_stream()
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._remove_stream(stream)
        self._remember_reset(stream_id, by_us=True)
        self._write_soon(frames.rst_stream(stream_id, code))
        if stream is not None:
            self._stream_aborted(stream, code, message)

    def _frame_on_closed_stream(self, stream_id: int) -> None:
        """HEADERS or DATA on a stream that is closed. Source: section 5.1, "closed"."""
        by_us = self._resets.get(stream_id)
        if by_us is False:
            self._stream_error(stream_id, frames.STREAM_CLOSED, "")
        elif by_us is None and stream_id > self._last_forgotten_reset:
            raise Http2ConnectionError(frames.STREAM_CLOSED, "frame on a closed stream")
        # else the peer had not received our RST_STREAM when it sent this, and it is ignored

    def _remember_reset(self, stream_id: int, *, by_us: bool) -> None:
        self._resets[stream_id] = by_us
        if len(self._resets) > MAX_REMEMBERED_RESETS:
            oldest = next(iter(self._resets))
            del self._resets[oldest]
            self._last_forgotten_reset = max(self._last_forgotten_reset, oldest)

    def _remove_stream(self, stream: Http2Stream) -> None:
        self._streams.pop(stream.stream_id, None)
        self._blocked.pop(stream, None)
        stream.send_queue.clear()
        if stream.send_waiter is not None:
            stream.send_waiter.set_result(None)
            stream.send_waiter = None

    def _count_control_frame(self, cost: int = 1) -> None:
        self._control_frames += cost
        if self._control_frames > MAX_CONTROL_FRAMES:
            raise Http2ConnectionError(frames.ENHANCE_YOUR_CALM, "too many control frames")

    def _count_aborted_stream(self) -> None:
        self._aborted_streams += 1
        if self._aborted_streams > MAX_ABORTED_STREAMS:
            raise Http2ConnectionError(frames.ENHANCE_YOUR_CALM, "too many streams reset")

    def _count_progress(self) -> None:
        """A request was answered, or a message received."""
        self._control_frames = 0
        if self._aborted_streams:
            self._aborted_streams -= 1

    # Sending.

    def _write_soon(self, *pieces: bytes | memoryview) -> None:
        """Write at the end of this iteration of the event loop: responses that become ready together are one write."""
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten += pieces

    def _write(self) -> None:
        pieces, self._unwritten = self._unwritten, []
        if not pieces or self._closing_since:
            return
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        elif sum(map(len, pieces)) > _LARGE_BYTES:
            self._transport.writelines(pieces)
        else:
            self._transport.write(b"".join(pieces))

    def _send_preface(self, preface: bytes, settings: dict[int, int]) -> None:
        """Send the connection preface. Source: section 3.4."""
        values = {
            frames.HEADER_TABLE_SIZE: 0,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_FRAME_SIZE: FRAME_SIZE,
            **settings,
        }
        window = frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        self._write_soon(preface + frames.settings(values) + window)

    def write_frames(self, data: bytes) -> None:
        """Send frames that are not flow-controlled, ahead of the send queues."""
        if not self._closing_since:
            self._write_soon(data)

    def send(self, stream: Http2Stream, headers: bytes, prefix: bytes, message: bytes, final_frames: bytes = b"") -> None:
        """Send DATA as far as the peer's windows allow, and queue the rest.

        Args:
            stream: that is open.
            headers: frames ahead of it, not flow-controlled.
            prefix: the first bytes of the payload, not empty.
            message: the rest of the payload; not copied if it is large.
            final_frames: frames after it, the last with END_STREAM.
        """
        size = len(prefix) + len(message)
        window = stream.send_window
        if (
            size <= window
            and size <= self._send_window
            and size <= self._max_send_frame
            and not (self._blocked or self._is_write_paused)
        ):
            stream.send_window = window - size
            self._send_window -= size
            header = frames.frame_header(size, frames.DATA, 0, stream.stream_id)
            if size > _LARGE_BYTES:
                self._write_soon(headers + header + prefix, message, final_frames)
            else:
                self._write_soon(b"%b%b%b%b%b" % (headers, header, prefix, message, final_frames))
            if final_frames:
                self._end_sent(stream)
            return
        if headers:
            self._write_soon(headers)
        pieces = (prefix, message) if len(message) > _LARGE_BYTES else (prefix + message,)
        stream.send_queue.extend(map(memoryview, pieces))
        stream.final_frames = final_frames
        self._blocked[stream] = None
        self._send_queued()

    def end_stream(self, stream: Http2Stream, final_frames: bytes) -> None:
        """Send frames that are not flow-controlled, the last with END_STREAM, after the send queue."""
        if stream.send_queue:
            stream.final_frames = final_frames
        else:
            self._write_soon(final_frames)
            self._end_sent(stream)

    async def drain_stream(self, stream: Http2Stream) -> None:
        """Wait until the send queue is sent, or the stream is gone."""
        if stream.send_queue:
            if stream.send_waiter is None:
                stream.send_waiter = self.create_future()
            await asyncio.shield(stream.send_waiter)

    def _send_queued(self) -> None:
        """Send from the queues, a frame of each stream in turn, as far as the windows allow."""
        while self._blocked and self._send_window > 0 and not self._is_write_paused:
            ready = [stream for stream in self._blocked if stream.send_window > 0]
            if not ready:
                return
            for stream in ready:
                if self._send_window <= 0 or self._is_write_paused:
                    return
                self._send_queued_frame(stream)

    def _send_queued_frame(self, stream: Http2Stream) -> None:
        payload = stream.send_queue[0]
        size = min(len(payload), self._max_send_frame, stream.send_window, self._send_window)
        stream.send_window -= size
        self._send_window -= size
        self._write_soon(frames.frame_header(size, frames.DATA, 0, stream.stream_id), payload[:size])
        if size < len(payload):
            stream.send_queue[0] = payload[size:]
            return
        stream.send_queue.popleft()
        if stream.send_queue:
            return
        del self._blocked[stream]
        if stream.final_frames:
            self._write_soon(stream.final_frames)
            self._end_sent(stream)
        elif stream.send_waiter is not None:
            stream.send_waiter.set_result(None)
            stream.send_waiter = None

    def _end_sent(self, stream: Any) -> None:
        """END_STREAM was sent. A server's stream is done then; if the peer's side is open, RST_STREAM was sent with it."""
        if not stream.remote_closed:
            self._remember_reset(stream.stream_id, by_us=True)
        self._remove_stream(stream)

    def acknowledge(self, stream: Http2Stream, n_bytes: int) -> None:
        """Return consumed bytes to the stream's receive window."""
        stream.unreturned += n_bytes
        if stream.unreturned > STREAM_WINDOW // 2 and not self._closing_since:
            self._write_soon(frames.window_update(stream.stream_id, stream.unreturned))
            stream.recv_window += stream.unreturned
            stream.unreturned = 0

    # Keepalive and closing.

    def tick(self, now: float) -> None:
        """Apply keepalive and timeouts, and begin a new interval for the limits. To be called every `TICK_INTERVAL_S`."""
        if not self._is_write_paused:  # else our replies pile up
            self._control_frames = 0
        self._aborted_streams = self._window_updates = 0
        self._sent_at_ticks = (self._sent_at_ticks[1], self._send_window_granted - self._send_window)
        if self._closing_since:
            if now - self._closing_since > CLOSE_TIMEOUT_S:
                self._transport.abort()
            return
        if self._was_heard:
            self._was_heard, self._heard_at, self._pinged_at = False, now, 0.0
        elif self._pinged_at:
            if now - self._pinged_at >= self._keepalive_timeout_s:
                self._transport.abort()
        elif now - self._heard_at >= self._keepalive_time_s:
            self._pinged_at = now
            self._write_soon(frames.frame(frames.PING, 0, 0, _KEEPALIVE_PING))

    def _send_drain_ping(self) -> None:
        """Have `_drain_ping_acknowledged` called once the peer has received what was sent so far."""
        self._write_soon(frames.frame(frames.PING, 0, 0, _DRAIN_PING))

    def close(self, code: int = frames.NO_ERROR, message: str = "") -> None:
        """Send GOAWAY, and close once what was sent is written."""
        if not self._closing_since:
            self._write_soon(frames.goaway(self._last_stream_id, code, message))
            self._write()
            self._closing_since = self.now()
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()
