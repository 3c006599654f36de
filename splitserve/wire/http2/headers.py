"""Header blocks: HPACK by the library hpack, and a memory of what was seen.

The peer is told to keep no table of headers (SETTINGS_HEADER_TABLE_SIZE 0). Then equal bytes mean equal headers: a block that
was seen before costs one look-up, a new one its fields that are new. A client's blocks differ in the deadline at most.

Source: RFC 7541.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import hpack

from splitserve.wire.http2.frames import COMPRESSION_ERROR

T = TypeVar("T")

Headers = list[tuple[bytes, bytes]]

MAX_REMEMBERED, MAX_REMEMBERED_BYTES = 64, 512
"""Blocks, and fields, that a connection remembers, if they are not longer; when there are more it begins anew."""

FIELD_OVERHEAD_BYTES = 32
"""Counted for each field beside its name and value. Source: RFC 9113, section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE."""


class ConnectionFault(Exception):
    """What the peer did that ends the connection: an error code of HTTP/2, and words for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class TooManyHeaders(Exception):
    """A block has more bytes than are taken. The connection is not harmed."""


class HeaderDecoder(Generic[T]):
    """The header blocks of one connection.

    Args:
        understand: what becomes of a block's headers; given again for the same bytes, so it must not be changed.
        max_bytes: of the headers of a block.
    """

    def __init__(self, understand: Callable[[Headers], T], max_bytes: int) -> None:
        self._understand = understand
        self._max_bytes = max_bytes
        self._decoder = hpack.Decoder(max_header_list_size=4 * max_bytes)
        self._is_stateless = False
        self._blocks: dict[bytes, T] = {}
        self._fields: dict[bytes, tuple[bytes, bytes]] = {}

    def forbid_table(self) -> None:
        """The peer has acknowledged that it may keep no table.

        It has to say so at the head of its next block. One that has put nothing into its table may leave that out: some that
        never use theirs do.
        """
        self._decoder.max_allowed_table_size = 0
        if not self._decoder.header_table.dynamic_entries:
            self._decoder.header_table_size = 0
            self._is_stateless = True

    def decode(self, block: bytes) -> T:
        """What the headers in a block mean.

        Raises:
            TooManyHeaders: there are more bytes than are taken.
            ConnectionFault: it is no header block, and what follows cannot be understood either.
        """
        known = self._blocks.get(block)
        if known is not None:
            return known
        try:
            headers = list(self._known_fields(block)) if self._is_stateless else self._decoded(block)
        except hpack.OversizedHeaderListError:
            if self._is_stateless:
                raise TooManyHeaders from None
            raise ConnectionFault(COMPRESSION_ERROR, "the headers are too large") from None
        except (hpack.HPACKError, IndexError):
            raise ConnectionFault(COMPRESSION_ERROR, "the headers cannot be read") from None
        if sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in headers) > self._max_bytes:
            raise TooManyHeaders
        meaning = self._understand(headers)
        if self._is_stateless:
            _remember(self._blocks, block, meaning)
        return meaning

    def _decoded(self, data: bytes) -> Headers:
        headers: Iterable[tuple[bytes, bytes]] = self._decoder.decode(data, raw=True)
        self._is_stateless = self._decoder.header_table_size == 0
        return [(bytes(name), bytes(value)) for name, value in headers]

    def _known_fields(self, block: bytes) -> Iterator[tuple[bytes, bytes]]:
        for start, end in _bounds(block):
            field = block[start:end]
            known = self._fields.get(field)
            if known is None:
                found = self._decoded(field)
                if not found:  # says again that there is no table
                    continue
                known = found[0]
                _remember(self._fields, field, known)
            yield known


def _remember(memory: dict[bytes, Any], data: bytes, meaning: Any) -> None:
    if len(data) <= MAX_REMEMBERED_BYTES:
        if len(memory) >= MAX_REMEMBERED:
            memory.clear()
        memory[data] = meaning


def _bounds(block: bytes) -> Iterator[tuple[int, int]]:
    """Where each field of a block begins and ends.

    Raises:
        IndexError: one goes beyond the block.
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
    """Where the integer at ``at`` ends, and its value. Source: RFC 7541, section 5.1."""
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


NO_TABLE = b"\x20"
"""Stands at the head of the first block that we send: we keep no table either, whatever the peer would allow.
Source: RFC 7541, section 6.3."""


def encode(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of literals, which no table is needed for and none is changed by.

    Args:
        headers: names in lower case, and values.
    """
    return b"".join(b"\x00%b%b%b%b" % (_length(name), name, _length(value), value) for name, value in headers)


def _length(text: bytes) -> bytes:
    """The length of a literal as it is. Source: RFC 7541, sections 5.1 and 5.2."""
    rest = len(text) - 0x7F
    if rest < 0:
        return bytes([len(text)])
    encoded = bytearray([0x7F])
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)
