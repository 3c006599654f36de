"""Compression of request and response bodies: gzip and deflate. Decompression is bounded."""

from __future__ import annotations

import gzip
import zlib

from splitserve.errors import InvalidInput, TooLarge

ENCODINGS = ("gzip", "deflate")
"""Supported, in order of preference."""

MIN_COMPRESSED_BYTES = 4096
"""Smaller responses are not compressed."""

_LEVEL = 1
_GZIP, _ZLIB, _RAW = 31, 15, -15


def inflate(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """Decompress a body.

    Args:
        body: the whole compressed body.
        encoding: one of `ENCODINGS`. For deflate, clients send both the zlib format and raw deflate.
        max_bytes: of the decompressed body.

    Raises:
        InvalidInput: not of that encoding, truncated, or followed by other bytes.
        TooLarge: more than ``max_bytes`` come out.
    """
    stream = zlib.decompressobj(_GZIP if encoding == "gzip" else _ZLIB if _is_zlib(body) else _RAW)
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidInput(f"body: expected {encoding}, got other bytes") from None
    if len(content) > max_bytes:
        raise TooLarge(f"decompressed body: expected at most {max_bytes} bytes, got more")
    if not stream.eof:
        raise InvalidInput(f"body: the {encoding} stream is truncated")
    if stream.unused_data:
        raise InvalidInput(f"body: {len(stream.unused_data)} bytes follow the {encoding} stream")
    return content


def _is_zlib(body: bytes) -> bool:
    """Source: RFC 1950, section 2.2: method 8, and a multiple of 31."""
    return len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0


def deflate(body: bytes, encoding: str) -> bytes:
    """Compress a body by one of `ENCODINGS`."""
    return gzip.compress(body, _LEVEL, mtime=0) if encoding == "gzip" else zlib.compress(body, _LEVEL)


def choose(accept_encoding: str) -> str:
    """The encoding of the response; "" for none. Source: RFC 9110, section 12.5.3."""
    wishes: dict[str, bool] = {}
    for item in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        weights = [part.removeprefix("q=") for part in parameters if part.startswith("q=")]
        wishes[name] = not weights or weights[0].strip("0.") != ""
    return next((encoding for encoding in ENCODINGS if wishes.get(encoding, wishes.get("*", False))), "")
