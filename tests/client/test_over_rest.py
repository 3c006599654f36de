"""REST against a scripted server that answers byte for byte."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from splitserve.errors import DeadlineExceeded, InvalidInput, TooLarge, Unavailable
from tests.client.scripted import RESET, X, answer, http, scripted
from tests.client.ways import Way


@pytest.mark.parametrize(
    "failure", [RESET, http(503, {"error": "draining"}), http(502, body=b"<html>"), http(503, {}, retry_after="0")]
)
async def test_requests_that_reached_no_model_are_retried(rest: Way, failure: bytes) -> None:
    """503, and a connection that is closed before any answer."""
    async with scripted(failure, failure, answer(1)) as server, rest.at(server.url) as client:
        result = await client.infer("echo", X)

    assert result["y"].tolist() == [[1]]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (http(400, {"error": "bad"}), InvalidInput),
        (http(503, {}, retry_after="3600"), Unavailable),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{", Unavailable),
    ],
    ids=["bad input", "Retry-After beyond the deadline", "cut off in the middle"],
)
async def test_errors_that_are_not_retryable_are_not_retried(rest: Way, failure: bytes, kind: type[Exception]) -> None:
    """Nor what was answered already, if only in part."""
    async with scripted(failure) as server, rest.at(server.url) as client:
        with pytest.raises(kind):
            await client.infer("echo", X)

    assert len(server.asked) == 1


async def test_token_headers_and_deadline_are_sent(rest: Way) -> None:
    """The deadline as the seconds that remain."""
    tokens = iter(["first", "second", "third"])
    options = {"token": lambda: next(tokens), "headers": {"X-User": "7"}, "timeout_s": 9}

    async with scripted(answer(1)) as server, rest.at(server.url, **options) as client:
        await client.infer("echo", X)
        await client.infer("echo", X)

    first, second = server.asked
    assert (first.headers["authorization"], second.headers["authorization"]) == ("Bearer second", "Bearer third")
    assert first.headers["x-user"] == "7"
    assert 8 < float(first.headers["request-timeout"]) <= 9
    assert first.headers["accept-encoding"] == "identity"


async def test_bodies_are_compressed_both_ways_on_request(rest: Way) -> None:
    """The header's length is of what was compressed."""
    compressed = gzip.compress(answer(1).partition(b"\r\n\r\n")[2])
    reply = http(200, body=compressed, content_encoding="gzip")

    async with scripted(reply) as server, rest.at(server.url, compression="gzip") as client:
        result = await client.infer("echo", {"x": np.zeros((1000, 2), np.float32)})
        await client.infer("echo", X)

    large, small = server.asked
    assert result["y"].tolist() == [[1]]
    assert (large.headers["content-encoding"], large.headers["accept-encoding"]) == ("gzip", "gzip")
    length = int(large.headers["inference-header-content-length"])
    assert json.loads(large.decoded[:length])["inputs"][0]["shape"] == [1000, 2]
    assert len(large.decoded) == length + 8000
    assert "content-encoding" not in small.headers


async def test_messages_have_a_limit_both_ways(rest: Way) -> None:
    """What is larger is not sent, and not read to its end."""
    large = http(200, {"outputs": [], "padding": "x" * 5000})

    async with scripted(large) as server, rest.at(server.url, max_message_bytes=2000) as client:
        with pytest.raises(TooLarge, match="the limit is 2000"):
            await client.infer("echo", {"x": np.zeros((1000, 2), np.float32)}, chunk_rows=0)
        with pytest.raises(TooLarge, match="exceeds the limit of 2000 bytes"):
            await client.infer("echo", X)

    assert len(server.asked) == 1


async def test_an_answer_that_trickles_is_deadline_exceeded(rest: Way) -> None:
    """The deadline is of the whole, not of its parts."""
    async with scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{") as server, rest.at(server.url) as client:
        with pytest.raises(DeadlineExceeded):
            await client.infer("echo", X, timeout_s=0.3)


async def test_a_server_below_a_path_is_reached(rest: Way) -> None:
    """As behind an ingress."""
    async with scripted(answer(1)) as server, rest.at(f"{server.url}/behind/a") as client:
        await client.is_live()

    assert server.asked[0].path == "/behind/a/v2/health/live"


async def test_after_a_failed_chunk_no_more_are_sent(rest: Way) -> None:
    """The rows are named."""
    rows = {"x": np.zeros((100, 2), np.float32)}

    async with scripted(answer(*[0.0] * 10), http(400, {"error": "bad"})) as server, rest.at(server.url) as client:
        with pytest.raises(InvalidInput, match=r"rows \d0 to \d9: bad"):
            await client.infer("echo", rows, chunk_rows=10, concurrency=2)

    assert len(server.asked) < 10
