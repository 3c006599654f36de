"""HTTP/1.1 at the client, byte by byte."""

from __future__ import annotations

import gzip

import pytest

from splitserve.client.http1 import BrokenResponse, ResponseReader, encode_request
from splitserve.errors import InvalidInput, TooLarge

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
COMPRESSED = gzip.compress(b"hello", mtime=0)

RESPONSES: dict[str, tuple[bytes, bool]] = {
    "content-length": (PLAIN, True),
    "chunks": (CHUNKED, True),
    "until the connection is closed": (b"HTTP/1.0 200 OK\r\n\r\nhello", False),
    "after an informational one": (b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, True),
    "gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(COMPRESSED) + COMPRESSED, True),
    "the connection is closed after it": (PLAIN.replace(b"X-A: 1", b"Connection: close"), False),
    "HTTP/1.0 that keeps it": (PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"X-A: 1", b"Connection: keep-alive"), True),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_read_in_whatever_pieces_it_arrives(name: str, size: int) -> None:
    """And it is known whether the connection can be used again."""
    data, keeps_alive = RESPONSES[name]
    reader = ResponseReader(1000)

    for start in range(0, len(data), size):
        assert not reader.is_complete
        reader.feed(data[start : start + size])
    if not reader.is_complete:
        reader.feed(b"")

    assert (reader.status, reader.body(), reader.is_complete, reader.keeps_alive) == (200, b"hello", True, keeps_alive)


@pytest.mark.parametrize("head", [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"])
def test_a_response_without_a_body_is_complete_with_its_headers(head: bytes) -> None:
    """No length is needed for it."""
    reader = ResponseReader(10)

    reader.feed(head)

    assert (reader.is_complete, reader.body(), reader.keeps_alive) == (True, b"", True)


@pytest.mark.parametrize(
    ("data", "is_begun", "is_http2"),
    [
        ([b""], False, False),
        ([b"HTTP/1.1 200 OK\r\n", b""], True, False),
        ([PLAIN[:-1], b""], True, False),
        ([CHUNKED[:-1], b""], True, False),
        ([b"\x00\x00\x06\x04\x00\x00\x00\x00\x00"], True, True),
        ([b"SSH-2.0-x\r\n"], True, False),
        ([b"HTTP/1.1 abc OK\r\n\r\n"], True, False),
        ([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], True, False),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"], True, False),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"], True, False),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n"], True, False),
        ([b"HTTP/1.1 200 OK\r\na: " + b"x" * 70_000], True, False),
    ],
)
def test_what_is_no_response_is_said_so(data: list[bytes], is_begun: bool, is_http2: bool) -> None:
    """And whether any of it had arrived: if not, the request can be sent again."""
    reader = ResponseReader(1000)

    with pytest.raises(BrokenResponse) as raised:
        for part in data:
            reader.feed(part)

    assert (raised.value.is_begun, raised.value.is_http2) == (is_begun, is_http2)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 11,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n" + b"x" * 11,
    ],
)
def test_a_body_beyond_the_limit_is_not_read_to_its_end(data: bytes) -> None:
    """Whatever its framing."""
    with pytest.raises(TooLarge, match="limit of 10 bytes"):
        ResponseReader(10).feed(data)


def test_a_small_body_that_expands_beyond_the_limit_is_refused() -> None:
    """A compressed one."""
    body = gzip.compress(bytes(1000))
    reader = ResponseReader(100)
    reader.feed(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    with pytest.raises(TooLarge):
        reader.body()


def test_a_connection_on_which_too_much_arrived_is_not_used_again() -> None:
    """The rest would be taken for the next response."""
    reader = ResponseReader(100)

    reader.feed(PLAIN + b"HTTP/1.1 200")

    assert (reader.body(), reader.keeps_alive) == (b"hello", False)


@pytest.mark.parametrize("headers", [{"a": "b\r\nc: d"}, {"a\r\nb": "c"}, {"": "a"}, {"a b": "c"}, {"a": "☃"}])
def test_a_header_that_would_be_another_one_is_refused(headers: dict[str, str]) -> None:
    """A line break in it could end the request."""
    with pytest.raises(InvalidInput, match="header"):
        encode_request("GET", "/", "host", headers, b"")
