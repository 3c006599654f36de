"""Messages in the bytes of a stream, metadata, statuses and timeouts: what gRPC puts into HTTP/2.

Source: gRPC, doc/PROTOCOL-HTTP2.md and doc/statuscodes.md.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from struct import Struct
from urllib.parse import quote_from_bytes, unquote_to_bytes

from google.rpc import code_pb2

PREFIX = Struct(">BI")
"""Of a message: whether it is compressed, and its length."""

ENCODINGS = {b"gzip": 31, b"deflate": 15}
"""Window bits of zlib for what a message may be compressed with."""

ACCEPTED = b"identity,deflate,gzip"

CONTENT_TYPE = b"application/grpc"

_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_DIGITS = 8

Metadata = Iterable[tuple[str, str | bytes]]


class CallError(Exception):
    """A call that ends with a status other than OK: its code's name, words, and trailing metadata."""

    def __init__(self, code: str, message: str, trailing: Metadata = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing = trailing


class MessageReader:
    """Takes messages out of the pieces that they come in.

    Args:
        max_bytes: of a message, decompressed or not.
        encoding: what compressed messages are compressed with; b"" for none.
    """

    __slots__ = ("_at", "_data", "_encoding", "_is_compressed", "_late", "_length", "_max_bytes", "_n_bytes")

    def __init__(self, max_bytes: int, encoding: bytes = b"") -> None:
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._data = b""
        self._at = 0
        self._late: list[bytes] = []
        self._n_bytes = 0
        self._length = -1
        self._is_compressed = False

    @property
    def is_empty(self) -> bool:
        """Whether no part of another message is here."""
        return not self._n_bytes and self._length < 0

    def feed(self, data: bytes) -> None:
        """Add a piece."""
        self._n_bytes += len(data)
        if self._at == len(self._data):
            self._data, self._at = data, 0
        else:
            self._late.append(data)

    def take(self) -> bytes | None:
        """The next message; None as long as it is not whole.

        Raises:
            CallError: it is larger than it may be, or compressed as it may not be.
        """
        self.check_size()
        size = self._length
        if size < 0 or self._n_bytes < size:
            return None
        self._gather(size)
        message = self._data[self._at : self._at + size]
        self._skip(size)
        self._length = -1
        return self._decompressed(message) if self._is_compressed else message

    def check_size(self) -> None:
        """Read the length of the next message, if it is here. Raises as `take`."""
        if self._length >= 0 or self._n_bytes < PREFIX.size:
            return
        self._gather(PREFIX.size)
        flag, length = PREFIX.unpack_from(self._data, self._at)
        self._skip(PREFIX.size)
        if length > self._max_bytes:
            raise too_large("Received", length, self._max_bytes)
        if flag > 1 or (flag and not self._encoding):
            raise CallError("INTERNAL", "the message is compressed, and grpc-encoding does not say how")
        self._length, self._is_compressed = length, bool(flag)

    def _gather(self, size: int) -> None:
        """Have so many bytes in one piece."""
        if len(self._data) - self._at < size:
            self._data = b"".join((memoryview(self._data)[self._at :], *self._late))
            self._at = 0
            self._late.clear()

    def _skip(self, size: int) -> None:
        self._at += size
        self._n_bytes -= size
        if self._at == len(self._data):
            self._data, self._at = self._late.pop(0) if len(self._late) == 1 else b"".join(self._late), 0
            self._late.clear()

    def _decompressed(self, data: bytes) -> bytes:
        decompressor = zlib.decompressobj(ENCODINGS[self._encoding])
        try:
            message = decompressor.decompress(data, self._max_bytes + 1)
        except zlib.error:
            raise CallError("INTERNAL", f"the message is not {self._encoding.decode()}") from None
        if len(message) > self._max_bytes:
            raise too_large("Decompressed", len(message), self._max_bytes)
        if not decompressor.eof:
            raise CallError("INTERNAL", f"the message is not {self._encoding.decode()}")
        return message


def prefix_of(message: bytes, max_bytes: int) -> bytes:
    """What stands before a message in a stream.

    Raises:
        CallError: it is larger than it may be.
    """
    size = len(message)
    if size > max_bytes:
        raise too_large("Sent", size, max_bytes)
    return PREFIX.pack(0, size)


def too_large(what: str, size: int, max_bytes: int) -> CallError:
    """The error of a message that is, in the words that gRPC has for it."""
    return CallError("RESOURCE_EXHAUSTED", f"{what} message larger than max ({size} vs. {max_bytes})")


def timeout_s(text: bytes) -> float:
    """The seconds in a ``grpc-timeout`` header.

    Raises:
        ValueError: it is none.
    """
    digits, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise ValueError
    return int(digits) * _UNITS_S[unit]


def status_code(name: str) -> int:
    """The number of a code."""
    number: int = code_pb2.Code.Value(name)
    return number


def status_name(number: bytes) -> str:
    """The name of a code; UNKNOWN for what is none."""
    try:
        name: str = code_pb2.Code.Name(int(number))
    except ValueError:
        return "UNKNOWN"
    return name


def encode_text(text: str) -> bytes:
    """A status' words, as a header has them."""
    return quote_from_bytes(text.encode(), safe=_PLAIN).encode()


def decode_text(value: bytes) -> str:
    """The words in a header."""
    return unquote_to_bytes(value).decode(errors="replace")


def encode_metadata(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Metadata as headers; values of names that end with ``-bin`` are bytes."""
    return [
        (name.encode(), base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
        for name, value in metadata
    ]
