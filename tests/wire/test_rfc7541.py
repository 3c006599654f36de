"""RFC 7541, rule by rule: header blocks as a peer may write them, and what our decoder makes of them, with its table and without.

A decoder without a dynamic table is what a connection has once the peer has acknowledged our SETTINGS_HEADER_TABLE_SIZE of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.frames import COMPRESSION_ERROR
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, HeaderDecoder, Headers, encode


@dataclass(frozen=True)
class HpackRule:
    """One rule for a decoder.

    Args:
        section: of RFC 7541.
        rule: in a sentence.
        blocks: of one connection, in order.
        expected: the headers of the last block; None: it is malformed, which ends the connection.
        has_table: whether the decoder has a dynamic table, of 4,096 bytes; None: it is tried with and without.
    """

    section: str
    rule: str
    blocks: Sequence[bytes]
    expected: Headers | None
    has_table: bool | None = None
    not_kept: str = ""

    @property
    def name(self) -> str:
        return f"{self.section} {self.rule}"

    @property
    def outcome(self) -> str:
        return "decoded" if self.expected is not None else "connection error COMPRESSION_ERROR"


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


A_B = b"\x40\x01a\x01b"
"""a: b, a literal with incremental indexing."""

REQUEST = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
LARGE = b"\x40\x01a\x7f\xa1\x1f" + bytes(0x7F + 0x21 + (0x1F << 7))
"""A field of more than 4,096 bytes, with incremental indexing."""

RULES = [
    # 2 Overview: tables and indices.
    HpackRule("2.3.1", "the first index is 1 in the static table", [b"\x81"], [(b":authority", b"")]),
    HpackRule("2.3.1", "the last index of the static table is 61", [b"\xbd"], [(b"www-authenticate", b"")]),
    HpackRule("2.3.2", "the newest entry of the dynamic table has the lowest index", [A_B + b"\x40\x01c\x01d", b"\xbe\xbf"],
              [(b"c", b"d"), (b"a", b"b")], has_table=True),
    HpackRule("2.3.2", "duplicate entries are no error", [A_B + A_B, b"\xbe\xbf"], [(b"a", b"b"), (b"a", b"b")], has_table=True),
    HpackRule("2.3.3", "an index beyond both tables is an error", [b"\xbe"], None),
    HpackRule("2.3.3", "an index beyond both tables is an error, for a name", [b"\x7e\x01x"], None),
    HpackRule("2.3.3", "without a table nothing is inserted", [A_B, b"\xbe"], None, has_table=False),
    # 3.2 A block may change the table, and order is kept.
    HpackRule("3.2", "fields keep their order, and may repeat", [b"\x82" + A_B + b"\x82"],
              [(b":method", b"GET"), (b"a", b"b"), (b":method", b"GET")]),
    HpackRule("3.2", "an entry is known to the fields behind it in the block", [A_B + b"\xbe"],
              [(b"a", b"b")] * 2, has_table=True),
    # 4 Dynamic table management.
    HpackRule("4.1", "an entry takes 32 bytes more than name and value",
              [b"\x3f\x25" + b"\x40\x01a\x01b" + b"\x40\x01c\x01d", b"\xbe\xbf"], [(b"c", b"d"), (b"a", b"b")], has_table=True),
    HpackRule("4.1", "and is evicted if that is too much",
              [b"\x3f\x24" + b"\x40\x01a\x01b" + b"\x40\x01c\x01d", b"\xbf"], None, has_table=True),
    HpackRule("4.2", "a size update above the limit is an error", [b"\x3f\xe2\x1f" + A_B], None),
    HpackRule("4.2", "a size update up to the limit is allowed", [b"\x3f\xe1\x1f" + A_B], [(b"a", b"b")], has_table=True),
    HpackRule("4.2", "a size update behind a field is an error", [A_B + b"\x20"], None),
    HpackRule("4.2", "two size updates may begin a block", [b"\x20\x3f\xe1\x1f" + A_B], [(b"a", b"b")], has_table=True),
    HpackRule("4.2", "two size updates may begin a block, without a table", [b"\x20\x20" + A_B], [(b"a", b"b")], has_table=False),
    HpackRule("4.2", "after our limit becomes 0, any other size is an error", [b"\x21" + A_B], None, has_table=False),
    HpackRule("4.2", "after our limit becomes 0, the next block begins with a size update", [A_B], [(b"a", b"b")],
              has_table=False,
              not_kept="nginx does not send it; see RFC 9113, section 4.3.1"),
    HpackRule("4.3", "a smaller table evicts entries", [A_B, b"\x20\xbe"], None, has_table=True),
    HpackRule("4.4", "an entry that is larger than the table empties it, and is no error", [A_B + LARGE, b"\xbe"],
              None, has_table=True),
    HpackRule("4.4", "an entry that is larger than the table is a field all the same", [b"\x3f\xe1\x1f" + LARGE + b"\x82"],
              [(b"a", bytes(len(LARGE) - 6)), (b":method", b"GET")], has_table=True),
    HpackRule("4.4", "a new entry may use the name of one that it evicts",
              [b"\x3f\x03" + A_B, b"\x7e\x01c\xbe"], [(b"a", b"c")] * 2, has_table=True),
    # 5 Primitive types.
    HpackRule("5.1", "an integer may take several bytes", [b"\x00\x01a\x7f\x09" + b"x" * 136], [(b"a", b"x" * 136)]),
    HpackRule("5.1", "an integer may have trailing zeros", [b"\x00\x01a\x7f\x89\x00" + b"x" * 136], [(b"a", b"x" * 136)]),
    HpackRule("5.1", "a truncated integer is an error", [b"\xff\x80"], None),
    HpackRule("5.1", "an integer that is far too large is an error", [b"\xff" + b"\xff" * 20 + b"\x01"], None),
    HpackRule("5.1", "an integer of very many bytes is an error", [b"\xff" + b"\x80" * 1000 + b"\x01"], None),
    HpackRule("5.2", "a string may be empty", [b"\x00\x01a\x00"], [(b"a", b"")]),
    HpackRule("5.2", "a string ends within the block", [b"\x00\x01a\x05b"], None),
    HpackRule("5.2", "a Huffman string ends within the block", [b"\x00\x01a\x85\xff"], None),
    HpackRule("5.2", "Huffman padding of more than 7 bits is an error", [b"\x00\x01a\x82\x1f\xff"], None),
    HpackRule("5.2", "Huffman padding of zeros is an error", [b"\x00\x01a\x81\x18"], None),
    HpackRule("5.2", "a Huffman string with EOS is an error", [b"\x00\x01a\x84\xff\xff\xff\xff"], None),
    HpackRule("5.2", "a Huffman string may be empty", [b"\x00\x01a\x80"], [(b"a", b"")]),
    # 6 Binary format.
    HpackRule("6.1", "index 0 is an error", [b"\x80"], None),
    HpackRule("6.2.1", "a literal with incremental indexing, with a name of its own", [A_B], [(b"a", b"b")]),
    HpackRule("6.2.1", "a literal with incremental indexing, with an indexed name", [b"\x41\x01x"], [(b":authority", b"x")]),
    HpackRule("6.2.2", "a literal without indexing, with a name of its own", [b"\x00\x01a\x01b"], [(b"a", b"b")]),
    HpackRule("6.2.2", "a literal without indexing, with an indexed name", [b"\x04\x01x"], [(b":path", b"x")]),
    HpackRule("6.2.2", "a literal without indexing, with a name whose index takes two bytes", [b"\x0f\x2e\x01x"],
              [(b"www-authenticate", b"x")]),
    HpackRule("6.2.2", "is not inserted", [b"\x00\x01a\x01b", b"\xbe"], None),
    HpackRule("6.2.3", "a literal that is never indexed, with a name of its own", [b"\x10\x01a\x01b"], [(b"a", b"b")]),
    HpackRule("6.2.3", "a literal that is never indexed, with an indexed name", [b"\x14\x01x"], [(b":path", b"x")]),
    HpackRule("6.2.3", "is not inserted", [b"\x10\x01a\x01b", b"\xbe"], None),
    HpackRule("6.3", "a size update alone is a block", [b"\x20"], []),
    # Appendix C: examples.
    HpackRule("C.1.2", "1337 with a prefix of 5 bits", [hexed("3f9a0a") + b"\x82"], [(b":method", b"GET")], has_table=True),
    HpackRule("C.2.1", "example", [hexed("400a637573746f6d2d6b65790d637573746f6d2d686561646572")],
              [(b"custom-key", b"custom-header")]),
    HpackRule("C.2.2", "example", [hexed("040c2f73616d706c652f70617468")], [(b":path", b"/sample/path")]),
    HpackRule("C.2.3", "example", [hexed("100870617373776f726406736563726574")], [(b"password", b"secret")]),
    HpackRule("C.2.4", "example", [hexed("82")], [(b":method", b"GET")]),
    HpackRule("C.3", "requests without Huffman coding",
              [hexed("828684410f7777772e6578616d706c652e636f6d"), hexed("828684be58086e6f2d6361636865"),
               hexed("828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565")],
              [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/index.html"), (b":authority", b"www.example.com"),
               (b"custom-key", b"custom-value")], has_table=True),
    HpackRule("C.4", "requests with Huffman coding",
              [hexed("828684418cf1e3c2e5f23a6ba0ab90f4ff"), hexed("828684be5886a8eb10649cbf"),
               hexed("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")],
              [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/index.html"), (b":authority", b"www.example.com"),
               (b"custom-key", b"custom-value")], has_table=True),
    HpackRule("C.4.1", "Huffman coding without a table", [hexed("828684418cf1e3c2e5f23a6ba0ab90f4ff")], REQUEST),
    HpackRule("C.5", "responses with eviction, a table of 256 bytes",
              [hexed("3fe101") + hexed("4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d"
                                       "546e1768747470733a2f2f7777772e6578616d706c652e636f6d"),
               hexed("4803333037c1c0bf")],
              [(b":status", b"307"), (b"cache-control", b"private"), (b"date", b"Mon, 21 Oct 2013 20:13:21 GMT"),
               (b"location", b"https://www.example.com")], has_table=True),
]  # fmt: skip


def decoder(*, has_table: bool) -> HeaderDecoder[Headers]:
    found: HeaderDecoder[Headers] = HeaderDecoder(lambda headers: headers, 100_000)
    if not has_table:
        found.disable_dynamic_table()
    return found


CASES = [(rule, table) for rule in RULES for table in ([True, False] if rule.has_table is None else [rule.has_table])]


@pytest.mark.parametrize(
    ("rule", "has_table"), CASES, ids=[f"{rule.name}{'' if table else ', no table'}" for rule, table in CASES]
)
def test_a_rule_of_hpack(rule: HpackRule, has_table: bool) -> None:
    """A malformed block is a connection error, since the state of compression is lost. The same block again means the same."""
    ours = decoder(has_table=has_table)
    for each in rule.blocks[:-1]:
        ours.decode(each)

    if rule.expected is None:
        with pytest.raises(Http2ConnectionError) as raised:
            ours.decode(rule.blocks[-1])
        assert raised.value.code == COMPRESSION_ERROR
    else:
        assert ours.decode(rule.blocks[-1]) == rule.expected


@pytest.mark.parametrize("has_table", [True, False])
def test_the_static_table(has_table: bool) -> None:
    """Appendix A: all 61 entries."""
    ours = decoder(has_table=has_table)
    expected = list(hpack.table.HeaderTable.STATIC_TABLE)

    assert [ours.decode(bytes([0x80 | index]))[0] for index in range(1, 62)] == expected
    assert len(expected) == 61


@given(st.binary(max_size=100))
def test_huffman_codes(value: bytes) -> None:
    """Appendix B: every byte."""
    block = hpack.Encoder().encode([(b"a", value), (b"all", bytes(range(256)))], huffman=True)

    assert decoder(has_table=True).decode(block) == [(b"a", value), (b"all", bytes(range(256)))]


@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=8))
def test_our_blocks_need_no_table_and_change_none(headers: Headers) -> None:
    """6.2.2, 6.3: literals without indexing behind a size update to 0."""
    theirs = hpack.Decoder(10**6)

    assert [tuple(each) for each in theirs.decode(TABLE_SIZE_ZERO + encode(headers), raw=True)] == headers
    assert theirs.header_table_size == 0
    assert not theirs.header_table.dynamic_entries
