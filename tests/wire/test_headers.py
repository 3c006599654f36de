"""Header blocks: ours decoded by the library hpack, and those of hpack by us, with a dynamic table and without."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.wire.grpc.messages import encode_metadata, percent_decode, percent_encode, timeout_s
from splitserve.wire.http2.headers import (
    MAX_CACHED,
    TABLE_SIZE_ZERO,
    HeaderDecoder,
    HeaderListTooLarge,
    Headers,
    Http2ConnectionError,
    encode,
)

fields = st.tuples(st.binary(max_size=300), st.binary(max_size=300))
headers = st.lists(fields | st.sampled_from([(b":method", b"POST"), (b"te", b"trailers")]), max_size=8)


def decoder(max_bytes: int = 100_000) -> HeaderDecoder[Headers]:
    return HeaderDecoder(lambda found: found, max_bytes)


@given(headers)
def test_our_blocks_are_decoded_by_hpack(sent: Headers) -> None:
    """Literals without a dynamic table."""
    assert [tuple(each) for each in hpack.Decoder(10**6).decode(TABLE_SIZE_ZERO + encode(sent), raw=True)] == sent


@given(st.lists(headers, max_size=6), st.booleans(), st.integers(0, 6))
def test_blocks_of_hpack_are_decoded(blocks: list[Headers], huffman: bool, n_before: int) -> None:
    """With a dynamic table until it is disabled, without one after, and repeated blocks."""
    theirs, ours = hpack.Encoder(), decoder()
    for index, sent in enumerate([*blocks, *blocks]):
        if index == n_before:
            ours.disable_dynamic_table()
            theirs.header_table_size = 0

        assert ours.decode(theirs.encode(sent, huffman=huffman)) == sent


def test_a_peer_without_entries_may_omit_the_size_update() -> None:
    """RFC 9113, 4.3.1, requires one; see docs/wire.md."""
    ours = decoder()
    assert ours.decode(encode([(b"a", b"b")])) == [(b"a", b"b")]
    ours.disable_dynamic_table()

    assert ours.decode(encode([(b"a", b"c")])) == [(b"a", b"c")]


def test_a_reference_to_an_evicted_entry_is_an_error() -> None:
    """Its meaning is unknown."""
    ours, theirs = decoder(), hpack.Encoder()
    ours.decode(theirs.encode([(b"a", b"b")]))
    ours.disable_dynamic_table()

    with pytest.raises(Http2ConnectionError):
        ours.decode(theirs.encode([(b"a", b"b")]))


@pytest.mark.parametrize("is_stateless", [False, True])
def test_header_lists_are_limited(is_stateless: bool) -> None:
    """32 bytes count for each field in addition to its own. A refused block is refused again, and others are not."""
    ours = decoder(1_000)
    if is_stateless:
        ours.disable_dynamic_table()
    assert ours.decode(encode([(b"a", bytes(967))]))

    for _ in range(2):
        with pytest.raises(HeaderListTooLarge):
            ours.decode(encode([(b"a", bytes(968))]))
        with pytest.raises(HeaderListTooLarge):
            ours.decode(encode([(b"a", b"b")] * 30))

    assert ours.decode(encode([(b"a", b"b")]))


def test_caches_are_limited() -> None:
    """By clients whose headers are new each time, too."""
    ours = decoder()
    ours.disable_dynamic_table()

    for number in range(3 * MAX_CACHED):
        assert ours.decode(encode([(b"n", str(number).encode())])) == [(b"n", str(number).encode())]

    ours.decode(encode([(b"n", bytes(10_000))]))

    assert max(map(len, [*ours._blocks, *ours._fields])) < 1_000
    assert len(ours._blocks) <= MAX_CACHED
    assert len(ours._fields) <= MAX_CACHED


@given(st.binary(max_size=40), st.booleans())
def test_arbitrary_bytes_are_headers_or_a_connection_error(data: bytes, is_stateless: bool) -> None:
    """And nothing else."""
    ours = decoder()
    if is_stateless:
        ours.disable_dynamic_table()
    try:
        found = ours.decode(data)
    except Http2ConnectionError:
        return
    assert isinstance(found, list)


@given(st.text())
def test_status_messages_survive_percent_encoding(text: str) -> None:
    """So that a header can carry them."""
    encoded = percent_encode(text.encode(errors="replace").decode())

    assert all(0x20 <= byte < 0x7F for byte in encoded)
    assert percent_decode(encoded) == text.encode(errors="replace").decode()


def test_binary_metadata_is_base64() -> None:
    """Without padding. Source: gRPC, doc/PROTOCOL-HTTP2.md, Binary-Header."""
    assert encode_metadata([("a", "b"), ("c-bin", b"\x00\xff")]) == [(b"a", b"b"), (b"c-bin", b"AP8")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"6n", 6e-9), (b"99999999S", 99_999_999)],
)
def test_timeouts(text: bytes, seconds: float) -> None:
    """Up to 8 digits and a unit."""
    assert timeout_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"S", b"1", b"-1S", b"1.5S", b"123456789S", b"1s", b"1 S", "٣S".encode()])
def test_malformed_timeouts(text: bytes) -> None:
    """Source: gRPC, doc/PROTOCOL-HTTP2.md, Timeout."""
    with pytest.raises(ValueError, match="^$"):
        timeout_s(text)
