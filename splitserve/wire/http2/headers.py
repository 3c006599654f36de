"""Header blocks: HPACK by the library hpack, and caches of blocks and fields.

We announce SETTINGS_HEADER_TABLE_SIZE = 0. Once the peer has acknowledged that, there is no dynamic table, so equal bytes mean
equal headers: a block that was seen before costs one dictionary look-up, a new one the decoding of its new fields. Blocks of one
client differ in the timeout at most.

Source: RFC 7541.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import hpack

from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.frames import COMPRESSION_ERROR

T = TypeVar("T")

Headers = list[tuple[bytes, bytes]]

MAX_CACHED, MAX_CACHED_BYTES = 64, 512
"""Entries of each cache, which is cleared when it is full, and the size of the longest entry."""

MAX_DECODED_BYTES = 256 * 1024
"""Limit on a decoded header list while the dynamic table is in use, when every block has to be decoded to its end to keep the
table in step."""

FIELD_OVERHEAD_BYTES = 32
"""Counted for each field in addition to its name and value. Source: RFC 9113, section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE."""


class HeaderListTooLarge(Exception):
    """A header list exceeds its limit. The connection can go on."""


class HeaderDecoder(Generic[T]):
    """Decodes the header blocks of one connection.

    Args:
        parse: interprets a header list. Its result is cached, so it must not be modified.
        max_bytes: of a header list, as SETTINGS_MAX_HEADER_LIST_SIZE counts it.
    """

    def __init__(self, parse: Callable[[Headers], T], max_bytes: int) -> None:
        self._parse = parse
        self._max_bytes = max_bytes
        self._decoder = hpack.Decoder(max_header_list_size=max(MAX_DECODED_BYTES, 4 * max_bytes))
        self._is_stateless = False
        """Whether the dynamic table is and stays empty: the peer has acknowledged that its size is 0."""
        self._blocks: dict[bytes, T] = {}
        self._fields: dict[bytes, tuple[bytes, bytes]] = {}

    def disable_dynamic_table(self) -> None:
        """The peer has acknowledged SETTINGS_HEADER_TABLE_SIZE = 0: evict the dynamic table.

        The peer's next block should begin with a size update to 0. Some peers omit it and never refer to the table (nginx, which
        inserts fields but looks none up; clients that do not insert), so it is not required: a reference to a missing entry is
        an error anyway. grpc-core does the same.
        """
        self._decoder.max_allowed_table_size = 0
        self._decoder.header_table_size = 0
        self._is_stateless = True

    def decode(self, block: bytes) -> T:
        """Decode and parse a header block.

        Raises:
            HeaderListTooLarge: the header list exceeds the limit. It was decoded as far as the dynamic table requires.
            Http2ConnectionError: the block is malformed; the state of compression is lost.
        """
        known = self._blocks.get(block)
        if known is not None:
            return known
        try:
            headers = self._decode_stateless(block) if self._is_stateless else self._decode_stateful(block)
        except (hpack.HPACKError, IndexError):
            raise Http2ConnectionError(COMPRESSION_ERROR, "malformed header block") from None
        parsed = self._parse(headers)
        if self._is_stateless:
            _cache(self._blocks, block, parsed)
        return parsed

    def _decode_stateful(self, block: bytes) -> Headers:
        headers = self._decode_fields(block)
        n_bytes = sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in headers)
        if n_bytes > self._max_bytes:
            raise HeaderListTooLarge
        return headers

    def _decode_stateless(self, block: bytes) -> Headers:
        headers: Headers = []
        n_bytes = 0
        for start, end in _field_bounds(block):
            encoded = block[start:end]
            field = self._fields.get(encoded)
            if field is None:
                decoded = self._decode_fields(encoded)
                if not decoded:  # a table size update
                    if headers:
                        raise hpack.HPACKDecodingError("table size update after a field")
                    continue
                field = decoded[0]
                _cache(self._fields, encoded, field)
            n_bytes += len(field[0]) + len(field[1]) + FIELD_OVERHEAD_BYTES
            if n_bytes > self._max_bytes:
                raise HeaderListTooLarge
            headers.append(field)
        return headers

    def _decode_fields(self, block: bytes) -> Headers:
        headers: Iterable[tuple[bytes, bytes]] = self._decoder.decode(block, raw=True)
        return [(bytes(name), bytes(value)) for name, value in headers]


def _cache(cache: dict[bytes, Any], key: bytes, value: Any) -> None:
    if len(key) <= MAX_CACHED_BYTES:
        if len(cache) >= MAX_CACHED:
            cache.clear()
        cache[key] = value


def _field_bounds(block: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each field representation in a block.

    Raises:
        IndexError: the last one is truncated.
    """
    at, end = 0, len(block)
    while at < end:
        start, first = at, block[at]
        if first & 0x80:
            at, _ = _integer(block, at, 0x7F)
        elif first & 0xE0 == 0x20:
            at, _ = _integer(block, at, 0x1F)
        else:
            at, index = _integer(block, at, 0x3F if first & 0x40 else 0x0F)
            for _ in range(1 if index else 2):
                at, length = _integer(block, at, 0x7F)
                at += length
        if at > end:
            raise IndexError
        yield start, at


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Position after the integer at ``at``, and its value. Source: RFC 7541, section 5.1."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return at, value
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return at, value
        if shift > 28:
            raise IndexError


TABLE_SIZE_ZERO = b"\x20"
"""Dynamic table size update to 0, at the head of our first block: we use no dynamic table either, even if the peer allows one.
Source: RFC 7541, section 6.3."""


def encode(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block of literals without indexing, which neither needs nor changes a dynamic table.

    Args:
        headers: names in lower case, and values.
    """
    return b"".join(b"\x00%b%b%b%b" % (_length(name), name, _length(value), value) for name, value in headers)


def _length(text: bytes) -> bytes:
    """The length prefix of a string literal without Huffman coding. Source: RFC 7541, sections 5.1 and 5.2."""
    rest = len(text) - 0x7F
    if rest < 0:
        return bytes([len(text)])
    encoded = bytearray([0x7F])
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)
