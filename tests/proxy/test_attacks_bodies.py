"""Bodies that are larger than they look, or not what they say: over a real socket, with the limit that a message has."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from tests.proxy.test_attacks_http import BODY_LIMIT, GOOD, INFER, Edge, edge_with, request


@pytest.fixture
async def edge() -> object:
    async with edge_with() as running:
        yield running


BOMB_BYTES = 300 * BODY_LIMIT


def bomb(encoding: str) -> bytes:
    """Some hundred kilobytes that claim to be 300 limits."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    zeros = bytes(1_000_000)
    return b"".join(packer.compress(zeros) for _ in range(BOMB_BYTES // len(zeros))) + packer.flush()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_decompression_bomb_is_inflated_up_to_the_limit_only(edge: Edge, encoding: str) -> None:
    """A04: refused as too large, and never held: memory grows by a few limits, not by what it claims."""
    body = bomb(encoding)
    assert len(body) < BODY_LIMIT
    tracemalloc.start()

    status, _, answer = await edge.post(body, INFER, f"Content-Encoding: {encoding}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (status, b"decompressed body" in answer) == (413, True)
    assert peak < 10 * BODY_LIMIT
    await edge.check_unharmed()


async def test_double_compression_is_decompressed_once(edge: Edge) -> None:
    """A04: the content is not JSON, and is not decompressed again."""
    status, _, _ = await edge.post(gzip.compress(gzip.compress(GOOD)), INFER, "Content-Encoding: gzip")

    assert status == 400
    await edge.check_unharmed()


BROKEN = {
    "plain": GOOD,
    "cut off": gzip.compress(GOOD)[:-9],
    "something behind": gzip.compress(GOOD) + b"x",
    "a member behind": gzip.compress(GOOD) + gzip.compress(b"x"),
    "wrong checksum": gzip.compress(GOOD)[:-8] + bytes(8),
    "nothing": b"\x1f\x8b",
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_body_that_contradicts_its_content_encoding_is_malformed(edge: Edge, case: str) -> None:
    """A05."""
    status, _, answer = await edge.post(BROKEN[case], INFER, "Content-Encoding: gzip")

    assert status == 400
    assert b"gzip" in answer
    assert (await edge.post(gzip.compress(GOOD), INFER, "Content-Encoding: gzip"))[0] == 200


async def test_an_endless_body_is_buffered_up_to_the_limit_only(edge: Edge) -> None:
    """A02: chunks that never end are cut off at the limit."""
    start = request("POST", INFER, "Transfer-Encoding: chunked")
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    tracemalloc.start()

    status, headers, _ = await edge.send(start, *[chunk] * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (status, headers["connection"]) == (413, "close")
    assert peak < 10 * BODY_LIMIT
    await edge.check_unharmed()


async def test_one_byte_chunks_cost_no_more_memory_than_their_bytes(edge: Edge) -> None:
    """A03: as many tiny chunks as may come are one body, and are held as one."""
    body = GOOD + b" " * 50_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    tracemalloc.start()

    status, _, _ = await edge.send(request("POST", INFER, "Transfer-Encoding: chunked") + chunks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert status == 200
    assert peak < 10 * BODY_LIMIT
