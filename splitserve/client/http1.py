"""HTTP/1.1 at the client, as bytes: requests out, responses in. No I/O. Source: RFC 9112.

The client's own, since an HTTP library would cost several times what the rest of a call does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from splitserve.errors import InvalidInput, TooLarge

MAX_HEAD_BYTES = 64 * 1024
"""Of the status line and headers of a response."""

_GZIP = zlib.MAX_WBITS | 16
_HTTP2_SETTINGS = 4
"""Type of the frame with which an HTTP/2 server begins, its fourth byte. Source: RFC 9113, section 3.4."""


class BrokenResponse(Exception):
    """The bytes that arrived are no response. ``is_begun``: some arrived; ``is_http2``: an HTTP/2 server sent them."""

    def __init__(self, message: str, *, is_begun: bool, is_http2: bool = False) -> None:
        super().__init__(message)
        self.is_begun = is_begun
        self.is_http2 = is_http2


def encode_request(method: str, target: str, host: str, headers: Mapping[str, str], body: bytes) -> list[bytes]:
    """The parts of a request: one if it is small.

    Raises:
        InvalidInput: a header cannot be sent.
    """
    lines = [f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n"]
    given: Mapping[str, Any] = headers
    for name, value in given.items():
        if isinstance(value, bytes):
            raise InvalidInput(f'header "{name[:64]}": expected str, got bytes, which are for gRPC')
        if not name.isascii() or any(sign in name for sign in "\r\n: ") or not name or any(sign in value for sign in "\r\n\0"):
            raise InvalidInput(f'header "{name[:64]}": its name or value has characters that are not allowed')
        lines.append(f"{name}: {value}\r\n")
    if body or method == "POST":
        lines.append(f"content-length: {len(body)}\r\n")
    lines.append("\r\n")
    try:
        head = "".join(lines).encode("latin-1")
    except UnicodeEncodeError as error:
        raise InvalidInput(f"a header has characters that are not allowed: {error.object[error.start : error.end]!r}") from None
    return [head + body] if len(body) <= MAX_HEAD_BYTES else [head, body]


class ResponseReader:
    """Reads one response from the bytes of a connection.

    Args:
        max_bytes: of the body, compressed or not.
    """

    __slots__ = ("_body", "_buffer", "_is_chunked", "_left", "_max_bytes", "headers", "is_complete", "keeps_alive", "status")

    def __init__(self, max_bytes: int) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case."""
        self.is_complete = False
        self.keeps_alive = False
        """Whether the connection can be used again."""
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._body = bytearray()
        self._left: int | None = None
        """Bytes of the body, or of the chunk, that have not arrived; None: all until the connection is closed."""
        self._is_chunked = False

    @property
    def is_begun(self) -> bool:
        """Whether any bytes have arrived."""
        return bool(self.status or self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes from the connection; b"": the peer closed it.

        Raises:
            BrokenResponse: they are no response, or it was cut off.
            TooLarge: the body exceeds its limit.
        """
        if not data:
            self._end()
            return
        if not self.status:
            self._buffer += data
            data = self._take_head()
            if not self.status:
                return
        if self._is_chunked:
            self._buffer += data
            self._take_chunks()
        else:
            self._take_body(data)

    def body(self) -> bytes:
        """The body, decompressed.

        Raises:
            BrokenResponse: its compression is invalid.
            TooLarge: it exceeds its limit.
        """
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding == "identity":
            return bytes(self._body)
        if encoding not in ("gzip", "x-gzip"):
            raise BrokenResponse(f"content-encoding: expected gzip or none, got {encoding[:32]}", is_begun=True)
        decompressor = zlib.decompressobj(_GZIP)
        try:
            body = decompressor.decompress(self._body, self._max_bytes + 1)
        except zlib.error:
            raise BrokenResponse("the body is not valid gzip", is_begun=True) from None
        self._check_size(len(body))
        if not decompressor.eof:
            raise BrokenResponse("the body is not valid gzip", is_begun=True)
        return body

    def _end(self) -> None:
        if self.status and self._left is None and not self._is_chunked:
            self.is_complete = True
        elif not self.is_complete:
            what = "in the middle of its response" if self.is_begun else "without a response"
            raise BrokenResponse(f"it closed the connection {what}", is_begun=self.is_begun)

    def _take_head(self) -> bytes:
        """Parse the status line and headers once they are complete, and return what follows them."""
        while True:
            start = bytes(self._buffer[:7])
            if start != b"HTTP/1."[: len(start)]:
                is_http2 = len(start) > _HTTP2_SETTINGS - 1 and start[0] == 0 and start[3] == _HTTP2_SETTINGS
                raise BrokenResponse("it does not answer in HTTP/1.1", is_begun=True, is_http2=is_http2)
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise BrokenResponse(f"its headers exceed {MAX_HEAD_BYTES} bytes", is_begun=True)
                return b""
            status = self._parse_head(self._buffer[:end].decode("latin-1"))
            rest = bytes(self._buffer[end + 4 :])
            self._buffer.clear()
            if status >= 200:
                self.status = status
                self._choose_framing()
                return rest
            self._buffer += rest  # 1xx: the final response follows
            if not rest:
                return b""

    def _parse_head(self, head: str) -> int:
        first, *lines = head.split("\r\n")
        version, _, rest = first.partition(" ")
        status = rest[:3]
        if not (status.isascii() and status.isdecimal() and len(status) == 3):
            raise BrokenResponse(f"malformed status line {first[:64]!r}", is_begun=True)
        headers: dict[str, str] = {}
        for line in lines:
            name, separator, value = line.partition(":")
            if not separator or not name or name != name.strip():
                raise BrokenResponse(f"malformed header {line[:64]!r}", is_begun=True)
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers and name != "content-length" else value
        self.headers = headers
        connection = headers.get("connection", "").lower()
        self.keeps_alive = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        return int(status)

    def _choose_framing(self) -> None:
        """How long the body is. Source: RFC 9112, section 6.3."""
        length = self.headers.get("content-length", "")
        if self.status in (204, 304):
            self._left = 0
        elif "transfer-encoding" in self.headers:
            self._is_chunked = self.headers["transfer-encoding"].lower() == "chunked"
            self.keeps_alive = self.keeps_alive and self._is_chunked
            self._left = 0 if self._is_chunked else None
            return
        elif length:
            if not (length.isascii() and length.isdecimal()):
                raise BrokenResponse(f"content-length is {length[:32]!r}", is_begun=True)
            self._left = int(length)
            self._check_size(self._left)
        else:
            self.keeps_alive = False
            return
        self.is_complete = self._left == 0

    def _take_body(self, data: bytes) -> None:
        if self._left is None:
            self._body += data
            self._check_size(len(self._body))
            return
        self._body += data[: self._left]
        if len(data) > self._left:
            self.keeps_alive = False  # nobody asked for more
        self._left -= min(len(data), self._left)
        self.is_complete = self._left == 0

    def _take_chunks(self) -> None:
        """Source: RFC 9112, section 7.1."""
        buffer = self._buffer
        while not self.is_complete:
            if self._left is not None and self._left > 0:
                part = buffer[: self._left]
                del buffer[: len(part)]
                self._body += part
                self._check_size(len(self._body))
                self._left -= len(part)
                if self._left:
                    return
                self._left = -1  # the line break after the chunk
            if self._left == -1:
                if len(buffer) < 2:
                    return
                if buffer[:2] != b"\r\n":
                    raise BrokenResponse("malformed chunk", is_begun=True)
                del buffer[:2]
                self._left = 0
            end = buffer.find(b"\r\n")
            if end < 0:
                if len(buffer) > MAX_HEAD_BYTES:
                    raise BrokenResponse("malformed chunk", is_begun=True)
                return
            size = bytes(buffer[:end]).partition(b";")[0].strip()
            try:
                length = int(size, 16)
            except ValueError:
                raise BrokenResponse("malformed chunk size", is_begun=True) from None
            if length:
                del buffer[: end + 2]
                self._left = length
            elif (trailers := buffer.find(b"\r\n\r\n", end)) >= 0:
                self.keeps_alive = self.keeps_alive and trailers + 4 == len(buffer)
                self.is_complete = True
            else:
                return

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise TooLarge(f"the response exceeds the limit of {self._max_bytes} bytes (max_message_bytes)")
