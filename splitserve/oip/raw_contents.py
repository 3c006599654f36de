"""Raw contents in protobuf messages, written and read around the library: a large tensor is copied once, not three times.

A protobuf message is its fields one after another, in any order, so that a message without its raw contents, followed by them, is
the message. Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Sequence

LARGE_BYTES = 16 * 1024
"""From this size on it pays."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def field(number: int, *parts: bytes) -> list[bytes]:
    """The bytes of a length-delimited field, whose value is the parts joined: its tag, its length, and the parts.

    Args:
        number: of the field, at most 15.
        parts: of its value.
    """
    return [bytes((number << 3 | _LENGTH_DELIMITED,)), _varint(sum(map(len, parts))), *parts]


def with_raw(envelope: bytes, number: int, raws: Sequence[bytes]) -> list[bytes]:
    """The parts of a message.

    Args:
        envelope: the message without its raw contents.
        number: of their field.
        raws: the contents, in order.
    """
    parts = [envelope]
    for raw in raws:
        parts += field(number, raw)
    return parts


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def without_raw(data: memoryview, number: int) -> tuple[bytes, list[memoryview]] | None:
    """The envelope of a message and its raw contents; None if the bytes are not a message, which the library then says.

    Args:
        data: the message.
        number: of the field of the contents.
    """
    kept: list[memoryview] = []
    raws: list[memoryview] = []
    position = kept_from = 0
    try:
        while position < len(data):
            begin = position
            tag, position = _read_varint(data, position)
            kind = tag & 7
            if kind == _LENGTH_DELIMITED:
                length, position = _read_varint(data, position)
                end = position + length
                if tag >> 3 == number and end <= len(data):
                    raws.append(data[position:end])
                    kept.append(data[kept_from:begin])
                    kept_from = end
                position = end
            elif kind == _VARINT:
                _, position = _read_varint(data, position)
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
            else:
                return None
    except (IndexError, ValueError):
        return None
    if position != len(data):
        return None
    return b"".join((*kept, data[kept_from:])), raws


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A varint, and where it ends.

    Raises:
        IndexError: the data end within it.
        ValueError: it is too long.
    """
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("varint too long")
