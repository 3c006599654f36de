"""Requests whose length intermediaries and servers have been known to disagree about.

Whatever an intermediary makes of such a request, the proxy behind it must see as many requests as the intermediary does: a second
one hidden in the body of the first would be answered to the next client on that connection.

Source: RFC 9112, sections 2.2, 5, 6 and 11.2.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.intermediaries.backends import Pool
from tests.intermediaries.balancers import Balancer
from tests.intermediaries.raw_http import RawConnection

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(120)]

Hide = Callable[[bytes], bytes]

POST = b"POST /v2/models/hold/infer HTTP/1.1\r\nHost: test\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
END = b"0\r\n\r\n"
N_VICTIMS = 300

_ms = itertools.count(100)
"""Milliseconds that a hidden request asks for: no two the same, so that the model can tell them apart."""


def hidden_request(ms: int) -> bytes:
    """A whole request, to be hidden in the body of another one."""
    body = json.dumps({"inputs": [{"name": "MS", "datatype": "INT32", "shape": [1, 1], "data": [ms]}]}).encode()
    return POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def message(headers: bytes, body: bytes = b"%(hidden)b", start: bytes = POST) -> Hide:
    """A request with these lines and this body; ``%(hidden)b`` is what it hides, ``%(n)d`` the length of that."""

    def hide(hidden: bytes) -> bytes:
        values = {b"n": len(hidden), b"end_and_hidden": len(END + hidden), b"hidden": hidden}
        return start + headers % values + b"\r\n" + body % values

    return hide


def both(transfer_encoding: bytes) -> Hide:
    """A length that covers what follows the last chunk."""
    return message(b"Content-Length: %(end_and_hidden)d\r\n" + transfer_encoding, END + b"%(hidden)b")


def chunks(body: bytes) -> Hide:
    return message(CHUNKED, body)


ONE_CHUNK = b"%(n)x\r\n%(hidden)b\r\n" + END

LENGTH_OR_CHUNKS = {
    "CL.TE": both(CHUNKED),
    "TE.CL": message(CHUNKED + b"Content-Length: 4\r\n", ONE_CHUNK),
    "TE.CL of nothing": message(CHUNKED + b"Content-Length: 0\r\n", ONE_CHUNK),
    "TE.TE twice": both(CHUNKED + b"Transfer-Encoding: identity\r\n"),
    "TE.TE unknown": both(b"Transfer-Encoding: xchunked\r\n"),
    "TE.TE unknown last": both(b"Transfer-Encoding: chunked, x\r\n"),
    "TE.TE blank before the colon": both(b"Transfer-Encoding : chunked\r\n"),
    "TE.TE tab": both(b"Transfer-Encoding:\tchunked\r\n"),
    "TE.TE vertical tab": both(b"Transfer-Encoding:\x0bchunked\r\n"),
    "TE.TE blank before the name": both(b" Transfer-Encoding: chunked\r\n"),
    "TE.TE upper case": both(b"TRANSFER-ENCODING: CHUNKED\r\n"),
    "TE.TE quoted": both(b'Transfer-Encoding: "chunked"\r\n'),
    "TE.TE after a bare LF": both(b"X: x\nTransfer-Encoding: chunked\r\n"),
    "TE.TE after a bare CR": both(b"X: x\rTransfer-Encoding: chunked\r\n"),
    "TE.TE folded": both(b"Transfer-Encoding:\r\n chunked\r\n"),
    "TE.TE folded into another header": both(b"X: x\r\n Transfer-Encoding: chunked\r\n"),
    "TE.TE with NUL": both(b"Transfer-Encoding: chunked\x00\r\n"),
    "chunks in HTTP/1.0": message(
        CHUNKED + b"Connection: keep-alive\r\n", END + b"%(hidden)b", POST.replace(b"1.1", b"1.0")
    ),
}  # fmt: skip

LENGTHS = {
    "twice": message(b"Content-Length: 0\r\nContent-Length: %(n)d\r\n"),
    "twice the other way": message(b"Content-Length: %(n)d\r\nContent-Length: 0\r\n"),
    "a list": message(b"Content-Length: 0, %(n)d\r\n"),
    "plus": message(b"Content-Length: +%(n)d\r\n"),
    "minus": message(b"Content-Length: -%(n)d\r\n"),
    "hexadecimal": message(b"Content-Length: 0x%(n)x\r\n"),
    "with a blank": message(b"Content-Length: %(n)d 0\r\n"),
    "blank before the colon": message(b"Content-Length : %(n)d\r\n"),
    "folded": message(b"Content-Length:\r\n %(n)d\r\n"),
    "folded in two": message(b"Content-Length: 0\r\n %(n)d\r\n"),
    "underscore": message(b"Content_Length: %(n)d\r\n"),
    "larger than any number": message(b"Content-Length: 18446744073709551616\r\n"),
    "ended by a bare LF": message(b"Content-Length: %(n)d\n", start=POST.replace(b"\r\n", b"\n")),
}

CHUNKS = {
    "headers ended by a bare LF": message(b"Transfer-Encoding: chunked\n", END + b"%(hidden)b"),
    "size ended by LF": chunks(b"%(n)x\n%(hidden)b\r\n" + END),
    "content ended by LF": chunks(b"%(n)x\r\n%(hidden)b\n" + END),
    "last ended by LF": chunks(b"0\n\n%(hidden)b"),
    "last ended by LF and CRLF": chunks(b"0\n\r\n%(hidden)b"),
    "size with 0x": chunks(b"0x%(n)x\r\n%(hidden)b\r\n" + END),
    "size with a sign": chunks(b"+%(n)x\r\n%(hidden)b\r\n" + END),
    "size with blanks": chunks(b" %(n)x \r\n%(hidden)b\r\n" + END),
    "size of nothing": chunks(b"\r\n%(hidden)b\r\n" + END),
    "size that overflows": chunks(b"10000000000000000\r\n%(hidden)b\r\n" + END),
    "extension with LF": chunks(b"0;a\n;b\r\n\r\n%(hidden)b"),
    "extension with CR": chunks(b"0;a\r;b\r\n\r\n%(hidden)b"),
    "trailer that gives a length": chunks(b"0\r\nContent-Length: 5\r\n\r\n%(hidden)b"),
    "trailer that is folded": chunks(b"0\r\nX: x\r\n y\r\n\r\n%(hidden)b"),
    "trailer without a colon": chunks(b"0\r\nGET / HTTP/1.1\r\n\r\n%(hidden)b"),
}

BODIES = {
    "of GET": message(b"Content-Length: %(n)d\r\n", start=b"GET /v2 HTTP/1.1\r\nHost: test\r\n"),
    "of HEAD": message(b"Content-Length: %(n)d\r\n", start=b"HEAD /v2 HTTP/1.1\r\nHost: test\r\n"),
    "of OPTIONS": message(b"Content-Length: %(n)d\r\n", start=b"OPTIONS * HTTP/1.1\r\nHost: test\r\n"),
    "of an upgrade to h2c": message(
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: %(n)d\r\n"
    ),
    "of an upgrade to WebSocket": message(
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\n",
        start=b"GET /v2 HTTP/1.1\r\nHost: test\r\n",
    ),
    "that was not asked for yet": message(b"Expect: 100-continue\r\nContent-Length: %(n)d\r\n"),
    "whose length is a hop's": message(b"Connection: Content-Length\r\nContent-Length: %(n)d\r\n"),
    "whose coding is a hop's": message(b"Connection: Transfer-Encoding\r\n" + CHUNKED, ONE_CHUNK),
}  # fmt: skip

KINDS_OF_REQUESTS = {"length or chunks": LENGTH_OR_CHUNKS, "length": LENGTHS, "chunk": CHUNKS, "body": BODIES}


@pytest.mark.parametrize("kind", KINDS_OF_REQUESTS)
def test_no_hidden_request_is_answered_to_somebody_else(plain_balancer: Balancer, pool: Pool, kind: str) -> None:
    """Those who ask at the same time get their own answers, and what the model was asked is what its sender got answers for."""
    hidden = {name: next(_ms) for name in KINDS_OF_REQUESTS[kind]}

    def send(name: str) -> list[int]:
        """The status of each answer to the sender; 200 of the model's alone."""
        with RawConnection(plain_balancer.http) as connection:
            connection.send(KINDS_OF_REQUESTS[kind][name](hidden_request(hidden[name])))
            answers = connection.remaining(timeout_s=1.0, is_head="HEAD" in name)
        return [answer.status for answer in answers if answer.status != 200 or b'"MS"' in answer.body]

    with ThreadPoolExecutor(len(hidden) + 1) as threads:
        asking = threads.submit(lambda: set(victims(plain_balancer)))
        statuses = dict(zip(hidden, threads.map(send, hidden), strict=True))
        found = asking.result()

    assert found == {"splitserve"}
    n_asked = {name: pool.stage.count(ms) for name, ms in hidden.items()}
    assert n_asked == {name: each.count(200) for name, each in statuses.items()}, statuses


def victims(balancer: Balancer) -> Iterator[str]:
    """What others get meanwhile and afterwards."""
    with httpx.Client(base_url=f"http://{balancer.http}", timeout=10) as client:
        for _ in range(N_VICTIMS):
            yield client.get("/v2").json()["name"]
