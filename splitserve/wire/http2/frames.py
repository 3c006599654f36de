"""HTTP/2 frames as bytes. Source: RFC 9113, sections 4, 6 and 7."""

from __future__ import annotations

from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Frame types.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

# Flags.
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

# Settings.
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(1, 7)

# Error codes.
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR = range(7)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(7, 12)

DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_SIZE = 16_384
MAX_FRAME_SIZE_LIMIT = 2**24 - 1
MAX_WINDOW = MAX_STREAM_ID = 2**31 - 1
"""Also the mask that clears the reserved bit of stream ids and window increments. Source: sections 4.1 and 6.9."""

FRAME_HEADER = Struct(">HBBBI")
"""Length in two parts, type, flags, reserved bit and stream id."""

FRAME_HEADER_SIZE = FRAME_HEADER.size
SETTING = Struct(">HI")
UINT32 = Struct(">I")
GOAWAY_FIELDS = Struct(">II")


def frame_header(length: int, frame_type: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes in front of a frame's payload."""
    return FRAME_HEADER.pack(length >> 8, length & 0xFF, frame_type, flags, stream_id)


def frame(frame_type: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return frame_header(len(payload), frame_type, flags, stream_id) + payload


def around_stream_id(frame_type: int, flags: int, payload: bytes) -> tuple[bytes, bytes]:
    """A frame that is the same for many streams, in two parts: what comes before its stream id (`UINT32`), and what after."""
    whole = frame(frame_type, flags, 0, payload)
    return whole[: FRAME_HEADER_SIZE - UINT32.size], payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*item) for item in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, UINT32.pack(increment))


def rst_stream(stream_id: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, UINT32.pack(code))


def goaway(last_stream_id: int, code: int, debug_data: str = "") -> bytes:
    """A GOAWAY frame."""
    return frame(GOAWAY, 0, 0, GOAWAY_FIELDS.pack(last_stream_id, code) + debug_data.encode())
