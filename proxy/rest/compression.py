"""Compressed bodies, both ways: gzip and deflate. What is inflated is bounded, whatever it claims to be."""

from __future__ import annotations

import gzip
import zlib

from splitserve.errors import InvalidInput, TooLarge

ENCODINGS = ("gzip", "deflate")
"""What is taken and given, most wanted first."""

MIN_COMPRESSED_BYTES = 4096
"""Smaller answers are not worth it."""

_LEVEL = 1
_GZIP, _ZLIB, _RAW = 31, 15, -15


def inflate(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body before it was compressed.

    Args:
        body: compressed, whole.
        encoding: one of `ENCODINGS`. As deflate both the zlib form and the bare one are sent by clients, and taken.
        max_bytes: no more is inflated.

    Raises:
        InvalidInput: not of that encoding, cut off, or with something behind.
        TooLarge: more than ``max_bytes`` come out.
    """
    stream = zlib.decompressobj(_GZIP if encoding == "gzip" else _ZLIB if _is_zlib(body) else _RAW)
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidInput(f"the body is not {encoding}") from None
    if len(content) > max_bytes:
        raise TooLarge(f"the body has more than the {max_bytes} bytes that are taken when it is inflated")
    if not stream.eof:
        raise InvalidInput(f"the {encoding} body is cut off")
    if stream.unused_data:
        raise InvalidInput(f"{len(stream.unused_data)} bytes follow the {encoding} body")
    return content


def _is_zlib(body: bytes) -> bool:
    """Source: RFC 1950, section 2.2: method 8, and a multiple of 31."""
    return len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0


def deflate(body: bytes, encoding: str) -> bytes:
    """The body, compressed as one of `ENCODINGS`."""
    return gzip.compress(body, _LEVEL, mtime=0) if encoding == "gzip" else zlib.compress(body, _LEVEL)


def choose(accept_encoding: str) -> str:
    """The encoding to answer with; "" is none. Source: RFC 9110, section 12.5.3."""
    wishes: dict[str, bool] = {}
    for item in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        weights = [part.removeprefix("q=") for part in parameters if part.startswith("q=")]
        wishes[name] = not weights or weights[0].strip("0.") != ""
    return next((encoding for encoding in ENCODINGS if wishes.get(encoding, wishes.get("*", False))), "")
