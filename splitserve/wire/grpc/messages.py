"""Length-prefixed messages, metadata, statuses and timeouts: what gRPC puts into HTTP/2.

Source: gRPC, doc/PROTOCOL-HTTP2.md and doc/statuscodes.md.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import zlib
from collections.abc import Iterable
from struct import Struct
from urllib.parse import quote_from_bytes, unquote_to_bytes

from google.rpc import code_pb2

PREFIX = Struct(">BI")
"""In front of a message: the compressed flag, and its length."""

ENCODINGS = {b"gzip": 31, b"deflate": 15}
"""Supported message encodings, and their window bits for zlib."""

ACCEPT_ENCODING = b"identity,deflate,gzip"

CONTENT_TYPE = b"application/grpc"

_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_DIGITS = 8

Metadata = Iterable[tuple[str, str | bytes]]


class CallError(Exception):
    """A status other than OK: the name of its code, its message, and trailing metadata."""

    def __init__(self, code: str, message: str, trailing: Metadata = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing = trailing


class MessageReader:
    """Reassembles messages from DATA payload.

    Args:
        max_bytes: of a message, decompressed or not.
        encoding: of messages with the compressed flag; b"": they are not allowed.
    """

    __slots__ = ("_at", "_data", "_encoding", "_is_compressed", "_length", "_max_bytes", "_n_bytes", "_rest")

    def __init__(self, max_bytes: int, encoding: bytes = b"") -> None:
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._data = b""
        self._at = 0
        self._rest: list[bytes] = []
        self._n_bytes = 0
        self._length = -1
        self._is_compressed = False

    @property
    def is_empty(self) -> bool:
        """Whether no part of a message is buffered."""
        return not self._n_bytes and self._length < 0

    def feed(self, data: bytes) -> None:
        """Add payload."""
        self._n_bytes += len(data)
        if self._at == len(self._data):
            self._data, self._at = data, 0
        else:
            self._rest.append(data)

    def take(self) -> bytes | None:
        """The next message; None if it is not complete.

        Raises:
            CallError: it exceeds its limit, or its compression is invalid.
        """
        if self._length < 0 and not self._rest and (message := self._take_contiguous()) is not None:
            return message
        self.check_size()
        size = self._length
        if size < 0 or self._n_bytes < size:
            return None
        self._gather(size)
        message = self._data[self._at : self._at + size]
        self._skip(size)
        self._length = -1
        return self._decompressed(message) if self._is_compressed else message

    def _take_contiguous(self) -> bytes | None:
        """The next message as `take` returns it, if it is plain, within its limit, and has arrived in one piece."""
        data, start = self._data, self._at + PREFIX.size
        n_bytes = len(data)
        if n_bytes < start:
            return None
        flag, length = PREFIX.unpack_from(data, self._at)
        end = start + length
        if flag or length > self._max_bytes or n_bytes < end:
            return None
        self._n_bytes -= length + PREFIX.size
        if end == n_bytes:
            self._data, self._at = b"", 0
        else:
            self._at = end
        return data[start:end]

    def check_size(self) -> None:
        """Check the length of the next message, if that has arrived. Raises as `take`."""
        if self._length >= 0 or self._n_bytes < PREFIX.size:
            return
        self._gather(PREFIX.size)
        flag, length = PREFIX.unpack_from(self._data, self._at)
        self._skip(PREFIX.size)
        if length > self._max_bytes:
            raise too_large("Received", length, self._max_bytes)
        if flag > 1 or (flag and not self._encoding):
            raise CallError("INTERNAL", "compressed message without a grpc-encoding")
        self._length, self._is_compressed = length, bool(flag)

    def _gather(self, size: int) -> None:
        """Make the next ``size`` bytes contiguous."""
        if len(self._data) - self._at < size:
            self._data = b"".join((memoryview(self._data)[self._at :], *self._rest))
            self._at = 0
            self._rest.clear()

    def _skip(self, size: int) -> None:
        self._at += size
        self._n_bytes -= size
        if self._at == len(self._data):
            self._data, self._at = self._rest.pop(0) if len(self._rest) == 1 else b"".join(self._rest), 0
            self._rest.clear()

    def _decompressed(self, data: bytes) -> bytes:
        decompressor = zlib.decompressobj(ENCODINGS[self._encoding])
        try:
            message = decompressor.decompress(data, self._max_bytes + 1)
        except zlib.error:
            raise CallError("INTERNAL", f"message is not valid {self._encoding.decode()}") from None
        if len(message) > self._max_bytes:
            raise too_large("Decompressed", len(message), self._max_bytes)
        if not decompressor.eof:
            raise CallError("INTERNAL", f"message is not valid {self._encoding.decode()}")
        return message


def message_prefix(message: bytes, max_bytes: int) -> bytes:
    """The length prefix of a message.

    Raises:
        CallError: the message exceeds ``max_bytes``.
    """
    size = len(message)
    if size > max_bytes:
        raise too_large("Sent", size, max_bytes)
    return PREFIX.pack(0, size)


def compress(message: bytes) -> tuple[bytes, bytes]:
    """The length prefix and the content of a message that is compressed by gzip."""
    compressor = zlib.compressobj(wbits=ENCODINGS[b"gzip"])
    content = compressor.compress(message) + compressor.flush()
    return PREFIX.pack(1, len(content)), content


def too_large(what: str, size: int, max_bytes: int) -> CallError:
    """The status of a message that exceeds its limit, in the words of grpc-core."""
    return CallError("RESOURCE_EXHAUSTED", f"{what} message larger than max ({size} vs. {max_bytes})")


def encode_timeout(seconds: float) -> bytes:
    """The value of a ``grpc-timeout`` header, at least a millisecond."""
    return b"%dm" % max(1, min(int(seconds * 1000), 10**_MAX_DIGITS - 1))


def timeout_s(text: bytes) -> float:
    """The seconds in a ``grpc-timeout`` header.

    Raises:
        ValueError: it is malformed.
    """
    digits, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise ValueError
    return int(digits) * _UNITS_S[unit]


def status_code(name: str) -> int:
    """The number of a status code."""
    number: int = code_pb2.Code.Value(name)
    return number


def status_name(number: bytes) -> str:
    """The name of a status code; UNKNOWN for an unknown number."""
    try:
        name: str = code_pb2.Code.Name(int(number))
    except ValueError:
        return "UNKNOWN"
    return name


def percent_encode(text: str) -> bytes:
    """A status message as a header value."""
    return quote_from_bytes(text.encode(), safe=_PLAIN).encode()


def percent_decode(value: bytes) -> str:
    """The status message in a header value."""
    return unquote_to_bytes(value).decode(errors="replace")


def encode_metadata(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Metadata as headers; values of names that end with ``-bin`` are bytes."""
    return [
        (name.encode(), base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
        for name, value in metadata
    ]


def decode_metadata(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str | bytes]]:
    """The metadata in headers; binary values that are malformed are omitted."""
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if not name.endswith(b"-bin"):
            metadata.append((name.decode(), value.decode(errors="replace")))
            continue
        with contextlib.suppress(binascii.Error):
            metadata.append((name.decode(), base64.b64decode(value + b"==")))
    return metadata
