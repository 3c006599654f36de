"""One end of an HTTP/2 connection: frames in and out, flow control both ways, signs of life, limits on what the peer may cost.

Reading and writing are plain calls in the event loop: what a piece of bytes means is done before the next one is looked at. A
message goes out as one write if the peer has room for it, else piece by piece as it makes room.

Source: RFC 9113; the section that a limit stands for is named with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from splitserve.wire.http2 import frames
from splitserve.wire.http2.frames import HEAD, HEAD_SIZE
from splitserve.wire.http2.headers import ConnectionFault

STREAM_WINDOW = 4 * 1024 * 1024
"""Bytes that a stream may bring before they are taken."""

CONNECTION_WINDOW = 16 * 1024 * 1024
"""The same for all streams of a connection together. It is given back as bytes arrive: no stream keeps another one waiting."""

FRAME_SIZE = 1024 * 1024
"""The largest frame that is taken. Contents are handed on as they come, whole or not."""

MAX_BLOCK_BYTES = 64 * 1024
"""Of a block of headers as it comes, and of any other frame that has to be whole to be understood."""

MAX_CONTINUATIONS = 64

MAX_NOISE = 4_000
"""Frames that bring a call no further which may come between two looks: pings, settings, resets, empty ones.
Source: RFC 9113, section 10.5; CVE-2019-9512 to 9518, CVE-2023-44487."""

LOOK_INTERVAL_S = 1.0
"""How often a connection is to be looked at."""

CLOSE_TIMEOUT_S = 5.0
"""How long the peer may take to take what was written before the connection was closed."""

_LONG_BYTES = 64 * 1024
"""What is longer is not copied to stand behind its head."""

_KEEPALIVE, _LAST_CALL = b"alive?\0\0", b"lastcall"


class Stream:
    """One stream: how much may still be sent and received on it, and what waits to be sent."""

    __slots__ = ("backlog", "number", "room", "send_window", "sending", "tail", "unreturned")

    def __init__(self, number: int, send_window: int) -> None:
        self.number = number
        self.send_window = send_window
        self.room = STREAM_WINDOW
        self.unreturned = 0
        self.backlog: deque[memoryview] = deque()
        self.tail = b""
        self.sending: asyncio.Future[None] | None = None


class Connection(asyncio.Protocol):
    """What both ends share. A subclass says what headers, contents and the end of a stream mean.

    Args:
        silent_s: a peer that has been silent for so long is asked for a sign of life, and left if none comes in as long again.
    """

    _transport: Any  # asyncio's or uvloop's, plain or TLS

    def __init__(self, *, silent_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._silent_s = silent_s
        self._streams: dict[int, Any] = {}
        self._rest = b""
        self._content_left = self._padding_left = self._content_stream = 0
        self._content_ends = False
        self._block: list[bytes] = []
        self._block_stream = 0
        self._block_ends = False
        self._room: int = CONNECTION_WINDOW
        self._unreturned = 0
        self._send_window: int = frames.DEFAULT_WINDOW
        self._stream_send_window: int = frames.DEFAULT_WINDOW
        self._max_frame: int = frames.DEFAULT_FRAME_SIZE
        self._blocked: dict[Stream, None] = {}
        self._unwritten: list[bytes | memoryview] = []
        self._is_gone = False
        self._is_write_paused = False
        self._noise = 0
        self._was_heard = False
        self._heard_at = self._loop.time()
        self._asked_at = 0.0
        self._closing_since = 0.0
        self._has_settings = False

    # What a subclass does.

    def _take_block(self, stream: int, block: bytes, is_end: bool) -> None:
        """Headers have come."""
        raise NotImplementedError

    def _take_content(self, stream: Any, content: bytes, is_end: bool) -> None:
        """Content has come for a stream that is known."""
        raise NotImplementedError

    def _take_reset(self, stream: Any, code: int) -> None:
        """The peer has ended a stream."""
        raise NotImplementedError

    def _is_past(self, stream: int) -> bool:
        """Whether a stream that is not known was known before."""
        raise NotImplementedError

    def _take_goodbye(self, last_stream: int) -> None:
        """The peer takes no streams after this one."""

    def _end(self) -> None:
        """The connection is gone."""

    def _settings_agreed(self) -> None:
        """The peer has acknowledged our settings."""

    def _last_call_heard(self) -> None:
        """The peer has got what was sent before `ask_last_call`."""

    # What the transport calls.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone = True
        self._closing_since = self._closing_since or self._loop.time()
        for stream in tuple(self._streams.values()):
            self._sent(stream)
        self._blocked.clear()
        self._end()

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._closing_since:
            return
        self._was_heard = True
        try:
            self._read(data)
        except ConnectionFault as fault:
            self.close(fault.code, fault.reason)

    # Reading.

    def _read(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = 0, len(data)
        while not self._closing_since:
            if self._content_left or self._padding_left:
                if at == end:
                    return
                at = self._read_content(data, at, end)
                continue
            if end - at < HEAD_SIZE:
                break
            high, low, kind, flags, number = HEAD.unpack_from(data, at)
            length = high << 8 | low
            if kind == frames.DATA:
                if flags & frames.PADDED and end - at == HEAD_SIZE:
                    break
                padding = data[at + HEAD_SIZE] if flags & frames.PADDED else -1
                at += HEAD_SIZE + (padding >= 0)
                self._begin_content(number, length, padding, bool(flags & frames.END_STREAM))
                continue
            if length > MAX_BLOCK_BYTES:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "the frame is too large")
            if end - at - HEAD_SIZE < length:
                break
            at += HEAD_SIZE + length
            self._take_frame(kind, flags, number, data[at - length : at])
        self._rest = data[at:]

    def _begin_content(self, number: int, length: int, padding: int, is_end: bool) -> None:
        if not number or self._block_stream:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a DATA frame where none may be")
        if length > FRAME_SIZE:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "the frame is too large")
        self._room -= length
        if self._room < 0:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "more was sent than there is room for")
        self._unreturned += length
        if self._unreturned > CONNECTION_WINDOW // 2:
            self._put(frames.window_update(0, self._unreturned))
            self._room += self._unreturned
            self._unreturned = 0
        size = length - (1 + padding if padding >= 0 else 0)
        if size < 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "more padding than frame")
        if not size or number not in self._streams:
            self._make_noise()
        stream = self._streams.get(number)
        if stream is None:
            if not self._is_past(number):
                raise ConnectionFault(frames.PROTOCOL_ERROR, "content of a stream that nobody has opened")
        else:
            stream.room -= length
            if stream.room < 0:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "more was sent on a stream than there is room for")
            if length != size:
                self.give_room(stream, length - size)
        self._content_left, self._padding_left = size, max(padding, 0)
        self._content_stream, self._content_ends = number, is_end
        if not size and is_end and stream is not None:
            self._take_content(stream, b"", True)

    def _read_content(self, data: bytes, at: int, end: int) -> int:
        """Hand on what there is of a DATA frame, and say where what follows begins."""
        if self._content_left:
            stop = min(end, at + self._content_left)
            self._content_left -= stop - at
            stream = self._streams.get(self._content_stream)
            if stream is not None:
                self._take_content(stream, data[at:stop], self._content_ends and not self._content_left)
            return stop
        stop = min(end, at + self._padding_left)
        self._padding_left -= stop - at
        return stop

    def _take_frame(self, kind: int, flags: int, number: int, content: bytes) -> None:
        if self._block_stream and (kind != frames.CONTINUATION or number != self._block_stream):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a frame between those of a block of headers")
        if not self._has_settings and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        take = self._TAKE.get(kind)
        if take is None:  # an extension, or PRIORITY
            self._make_noise()
        else:
            take(self, flags, number, content)

    def _make_noise(self) -> None:
        self._noise += 1
        if self._noise > MAX_NOISE:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many frames that bring no call further")

    def _take_headers(self, flags: int, number: int, content: bytes) -> None:
        if not number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "headers of no stream")
        start, end = 0, len(content)
        if flags & frames.PADDED:
            if not content:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "no room for padding")
            start, end = 1, end - content[0]
        if flags & frames.HAS_PRIORITY:
            start += 5
        if start > end:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "more padding than frame")
        self._block_stream, self._block_ends = number, bool(flags & frames.END_STREAM)
        self._extend_block(flags, content[start:end])

    def _take_continuation(self, flags: int, number: int, content: bytes) -> None:
        if not self._block_stream:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a continuation of nothing")
        self._extend_block(flags, content)

    def _extend_block(self, flags: int, content: bytes) -> None:
        self._block.append(content)
        if len(self._block) > MAX_CONTINUATIONS or sum(map(len, self._block)) > MAX_BLOCK_BYTES:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "the headers are too large")
        if flags & frames.END_HEADERS:
            block, number = b"".join(self._block), self._block_stream
            self._block, self._block_stream = [], 0
            self._take_block(number, block, self._block_ends)

    def _take_rst_stream(self, flags: int, number: int, content: bytes) -> None:
        if len(content) != frames.NUMBER.size:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        self._make_noise()
        stream = self._streams.get(number)
        if stream is not None:
            self._drop(stream)
            self._take_reset(stream, frames.NUMBER.unpack(content)[0])
        elif not self._is_past(number):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "the end of a stream that nobody has opened")

    def _take_settings(self, flags: int, number: int, content: bytes) -> None:
        self._make_noise()
        if number or len(content) % frames.SETTING.size or (flags & frames.ACK and content):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS are not as they should be")
        if flags & frames.ACK:
            self._settings_agreed()
            return
        self._has_settings = True
        for name, value in frames.SETTING.iter_unpack(content):
            if name == frames.INITIAL_WINDOW_SIZE:
                self._set_stream_window(value)
            elif name == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value < 2**24:
                    raise ConnectionFault(frames.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of its range")
                self._max_frame = min(value, FRAME_SIZE)
        self._put(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _set_stream_window(self, value: int) -> None:
        if value > frames.MAX_WINDOW:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is out of its range")
        change, self._stream_send_window = value - self._stream_send_window, value
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "a window is out of its range")
        self._flush()

    def _take_push_promise(self, flags: int, number: int, content: bytes) -> None:
        raise ConnectionFault(frames.PROTOCOL_ERROR, "nothing may be pushed")

    def _take_ping(self, flags: int, number: int, content: bytes) -> None:
        if number or len(content) != len(_KEEPALIVE):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING has 8 bytes")
        self._make_noise()
        if not flags & frames.ACK:
            self._put(frames.frame(frames.PING, frames.ACK, 0, content))
        elif content == _LAST_CALL:
            self._last_call_heard()

    def _take_goaway(self, flags: int, number: int, content: bytes) -> None:
        if number or len(content) < frames.GOODBYE.size:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "GOAWAY is not as it should be")
        self._make_noise()
        self._take_goodbye(frames.GOODBYE.unpack_from(content)[0])

    def _take_window_update(self, flags: int, number: int, content: bytes) -> None:
        if len(content) != frames.NUMBER.size:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        self._make_noise()
        size = frames.NUMBER.unpack(content)[0]
        if not size:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        if not number:
            self._send_window += size
            if self._send_window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the window of the connection is out of its range")
            self._flush()
            return
        stream = self._streams.get(number)
        if stream is not None:
            stream.send_window += size
            if stream.send_window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the window of a stream is out of its range")
            if stream in self._blocked:
                self._flush()
        elif not self._is_past(number):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "room for a stream that nobody has opened")

    _TAKE: ClassVar[dict[int, Callable[[Any, int, int, bytes], None]]] = {
        frames.HEADERS: _take_headers,
        frames.RST_STREAM: _take_rst_stream,
        frames.SETTINGS: _take_settings,
        frames.PUSH_PROMISE: _take_push_promise,
        frames.PING: _take_ping,
        frames.GOAWAY: _take_goaway,
        frames.WINDOW_UPDATE: _take_window_update,
        frames.CONTINUATION: _take_continuation,
    }

    # Writing.

    def _put(self, *pieces: bytes | memoryview) -> None:
        """Have these written once all that is ready now has been dealt with: answers that are ready together are one write."""
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten += pieces

    def _write(self) -> None:
        pieces, self._unwritten = self._unwritten, []
        if not pieces or self._is_gone:
            return
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        elif sum(map(len, pieces)) > _LONG_BYTES:
            self._transport.writelines(pieces)
        else:
            self._transport.write(b"".join(pieces))

    def _greet(self, before: bytes, values: dict[int, int]) -> None:
        """Send what a connection begins with."""
        ours = {
            frames.HEADER_TABLE_SIZE: 0,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_FRAME_SIZE: FRAME_SIZE,
            **values,
        }
        more = frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        self._put(before + frames.settings(ours) + more)

    def send(self, stream: Stream, before: bytes, prefix: bytes, content: bytes, tail: bytes = b"") -> None:
        """Send content on a stream, as far as the peer has room for it now, and the rest as it makes room.

        Args:
            stream: that is open.
            before: frames to go ahead of it, which need no room.
            prefix: the first bytes of the content, not empty.
            content: the others, which are not copied if they are many.
            tail: frames to go after it, the last of which ends the stream at this end.
        """
        size = len(prefix) + len(content)
        window = stream.send_window
        if (
            size <= window
            and size <= self._send_window
            and size <= self._max_frame
            and not (self._blocked or self._is_write_paused)
        ):
            stream.send_window = window - size
            self._send_window -= size
            head = frames.head(size, frames.DATA, 0, stream.number)
            if size > _LONG_BYTES:
                self._put(before + head + prefix, content, tail)
            else:
                self._put(b"%b%b%b%b%b" % (before, head, prefix, content, tail))
            if tail:
                self._sent(stream)
            return
        if before:
            self._put(before)
        pieces = (prefix, content) if len(content) > _LONG_BYTES else (prefix + content,)
        stream.backlog.extend(map(memoryview, pieces))
        stream.tail = tail
        self._blocked[stream] = None
        self._flush()

    def send_frames(self, stream: Stream, frames_of_it: bytes) -> None:
        """Send what needs no room and ends the stream at this end, after what waits."""
        if stream.backlog:
            stream.tail = frames_of_it
        else:
            self._put(frames_of_it)
            self._sent(stream)

    async def drained(self, stream: Stream) -> None:
        """Wait until all that was sent on a stream is on its way, or the stream is gone."""
        if stream.backlog:
            if stream.sending is None:
                stream.sending = self._loop.create_future()
            await asyncio.shield(stream.sending)

    def _flush(self) -> None:
        """Send what waits, a frame of each stream in turn, as far as there is room."""
        while self._blocked and self._send_window > 0 and not self._is_write_paused:
            ready = [stream for stream in self._blocked if stream.send_window > 0]
            if not ready:
                return
            for stream in ready:
                if self._send_window <= 0 or self._is_write_paused:
                    return
                self._send_piece(stream)

    def _send_piece(self, stream: Stream) -> None:
        content = stream.backlog[0]
        size = min(len(content), self._max_frame, stream.send_window, self._send_window)
        stream.send_window -= size
        self._send_window -= size
        self._put(frames.head(size, frames.DATA, 0, stream.number), content[:size])
        if size < len(content):
            stream.backlog[0] = content[size:]
            return
        stream.backlog.popleft()
        if stream.backlog:
            return
        del self._blocked[stream]
        if stream.tail:
            self._put(stream.tail)
            self._sent(stream)
        elif stream.sending is not None:
            stream.sending.set_result(None)
            stream.sending = None

    def _sent(self, stream: Any) -> None:
        """Nothing more goes out on this stream."""
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        """It is known no longer."""
        self._streams.pop(stream.number, None)
        self._blocked.pop(stream, None)
        stream.backlog.clear()
        if stream.sending is not None:
            stream.sending.set_result(None)
            stream.sending = None

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream at once."""
        self._drop(stream)
        self._put(frames.reset(stream.number, code))

    def give_room(self, stream: Stream, size: int) -> None:
        """So many bytes of a stream were taken: as many more may come."""
        stream.unreturned += size
        if stream.unreturned > STREAM_WINDOW // 2 and not self._closing_since:
            self._put(frames.window_update(stream.number, stream.unreturned))
            stream.room += stream.unreturned
            stream.unreturned = 0

    # Life.

    def tick(self, now: float) -> None:
        """Look whether the peer is still there; to be called every `LOOK_INTERVAL_S`."""
        self._noise = 0
        if self._closing_since:
            if now - self._closing_since > CLOSE_TIMEOUT_S:
                self._transport.abort()
            return
        if self._was_heard:
            self._was_heard, self._heard_at, self._asked_at = False, now, 0.0
        elif self._asked_at:
            if now - self._asked_at >= self._silent_s:
                self._transport.abort()
        elif now - self._heard_at >= self._silent_s:
            self._asked_at = now
            self._put(frames.frame(frames.PING, 0, 0, _KEEPALIVE))

    def ask_last_call(self) -> None:
        """Have `_last_call_heard` called once the peer has got what was sent so far."""
        self._put(frames.frame(frames.PING, 0, 0, _LAST_CALL))

    def close(self, code: int = frames.NO_ERROR, reason: str = "", last_stream: int = 0) -> None:
        """Say goodbye and close, once what was written is taken."""
        if not self._closing_since:
            self._closing_since = self._loop.time()
            self._put(frames.goaway(last_stream, code, reason))
            self._write()
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()
