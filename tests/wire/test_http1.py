"""Our HTTP/1.1 connection, byte by byte: upgrades that are not taken, 100 Continue, chunked bodies, early responses."""

from __future__ import annotations

import asyncio

import pytest

from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpLimits, HttpListener
from splitserve.wire.http1.messages import Handled, HttpRequest, HttpResponse, Respond
from splitserve.wire.listening import FIRST_REQUEST_GRACE_S
from tests.wire.fakes import FakeTransport


class Transport(FakeTransport):
    """Has no buffer that could fill up."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0


class Client:
    """Bytes to one connection whose handler gives each body back, with the method and the path."""

    def __init__(
        self,
        *,
        reads_body: bool = True,
        max_body_bytes: int = 100_000,
        limits: HttpLimits | None = None,
        beside: Client | None = None,
    ) -> None:
        self.transport = Transport()
        self.budget = ByteBudget(10**9)
        self._reads_body = reads_body
        limits = limits or HttpLimits()
        listener = HttpListener(self._handle, limits, max_body_bytes=max_body_bytes, budget=self.budget)
        self.listener = beside.listener if beside else listener
        self.connection = Http1Connection(self.listener)
        self.connection.connection_made(self.transport)

    def _handle(self, request: HttpRequest, respond: Respond) -> Handled:
        if not self._reads_body:
            return HttpResponse(403, b"no")
        return self._echo(request)

    async def _echo(self, request: HttpRequest) -> HttpResponse:
        body = await request.body.read()
        return HttpResponse(200, f"{request.method} {request.path} ".encode() + body)

    async def send(self, *parts: bytes) -> list[tuple[int, bytes]]:
        """Status and body of each response."""
        for each in parts:
            self.connection.data_received(each)
            await self.settle()
        return responses(self.transport.take())

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def responses(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length")]
        length = lengths[0] if lengths else 0
        found.append((int(lines[0].split()[1]), rest[:length]))
        data = rest[length:]
    return found


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
"""As Java's default client and ``curl --http2`` send it with their first request."""

PLAIN = b"POST /plain HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"

UPGRADES = {
    "no body": (b"GET /up HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n", b"GET /up "),
    "a body": (b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" + H2C + b"\r\nhello", b"POST /up hello"),
    "an empty body": (b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n" + H2C + b"\r\n", b"POST /up "),
    "chunks": (
        b"POST /up HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + H2C + b"\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        b"POST /up hello",
    ),
    "WebSocket": (b"GET /up HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"GET /up "),
    "a body that looks like a request": (
        b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 28\r\n" + H2C + b"\r\nGET /evil HTTP/1.1\r\nA: b\r\n\r\n",
        b"POST /up GET /evil HTTP/1.1\r\nA: b\r\n\r\n",
    ),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("name", UPGRADES)
async def test_an_upgrade_that_is_not_taken_is_answered_over_http_1(name: str, size: int) -> None:
    """RFC 9110, 7.8: with its body, however it is cut, and the connection is kept for the next requests, upgrades too."""
    request, body = UPGRADES[name]
    sent = request + PLAIN + request + PLAIN
    client = Client()

    answered = await client.send(*(sent[at : at + size] for at in range(0, len(sent), size)))

    assert answered == [(200, body), (200, b"POST /plain abc")] * 2
    assert not client.transport.is_closed
    assert client.budget.used == 0


async def test_an_upgrade_with_a_body_that_is_too_large_is_refused() -> None:
    """Its limits are those of every request."""
    client = Client(reads_body=False, max_body_bytes=10)
    answered = await client.send(b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n" + H2C + b"\r\n" + bytes(50))

    assert answered == [(403, b"no")]
    assert (await client.send(bytes(450)), client.transport.is_closed) == ([], True)


async def test_a_malformed_body_behind_an_upgrade_is_refused() -> None:
    """Chunks that are none."""
    client = Client()
    answered = await client.send(b"POST /up HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + H2C + b"\r\nzz\r\n")

    assert answered == [(400, b'{"error":"malformed HTTP/1.1 request"}')]
    assert client.transport.is_closed


async def test_nothing_is_read_behind_connect() -> None:
    """What follows is not HTTP."""
    client = Client()
    answered = await client.send(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n" + PLAIN)

    assert len(answered) == 1
    assert client.transport.is_closed


async def test_100_continue_is_sent_when_the_body_is_wanted() -> None:
    """RFC 9110, 10.1.1: before the body; not if it is here already, nor if the request is refused without it."""
    head = b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    client = Client()
    assert await client.send(head) == [(100, b"")]
    assert await client.send(b"abc") == [(200, b"POST /e abc")]
    assert await client.send(head + b"abc") == [(200, b"POST /e abc")]

    assert await Client(reads_body=False).send(head) == [(403, b"no")]


async def test_a_chunked_upload_in_any_pieces() -> None:
    """Chunk extensions and trailers are ignored, and the next request is served."""
    upload = (
        b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\nT: x\r\n\r\n"
    )
    for size in (1, 3, 1_000):
        client = Client()
        sent = upload + PLAIN
        answered = await client.send(*(sent[at : at + size] for at in range(0, len(sent), size)))

        assert answered == [(200, b"POST /c hello!"), (200, b"POST /plain abc")]


async def test_an_early_response_is_not_lost() -> None:
    """RFC 9112, 9.6: the rest of the body is discarded for a while before the connection is closed."""
    client = Client(reads_body=False)
    answered = await client.send(b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")

    assert answered == [(403, b"no")]
    assert not client.transport.is_closed
    assert (await client.send(bytes(997)), client.transport.is_closed) == ([], True)


async def test_a_client_that_leaves_within_its_body_leaves_nothing() -> None:
    """Its bytes are released, and its handler is cancelled."""
    client = Client()
    await client.send(b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert client.budget.used == 3

    client.connection.connection_lost(None)
    await client.settle()

    assert client.budget.used == 0


async def test_a_new_connection_that_drains_serves_its_first_request() -> None:
    """It may be on its way: a balancer that has just connected for it would lose it."""
    client = Client()
    client.listener.drain()
    assert not client.transport.is_closed

    assert await client.send(PLAIN) == [(200, b"POST /plain abc")]
    assert client.transport.is_closed


async def test_a_new_connection_without_a_request_does_not_delay_draining() -> None:
    """Nor does one that is idle between requests."""
    new, idle = Client(), Client()
    await idle.send(PLAIN)
    new.listener.drain()
    idle.listener.drain()
    assert (new.transport.is_closed, idle.transport.is_closed) == (False, True)

    new.connection.tick(asyncio.get_running_loop().time() + FIRST_REQUEST_GRACE_S)

    assert new.transport.is_closed


WAITING = {
    "a request": b"",
    "the rest of a head": b"GET / HTTP/1.1\r\n",
    "the next request": PLAIN,
    "the rest of a body": PLAIN[:-1],
}


@pytest.mark.parametrize("sent", WAITING.values(), ids=WAITING)
async def test_a_connection_that_waits_for_its_client_may_make_room(sent: bytes) -> None:
    """Of several the one that waits longest: the first."""
    first = Client(limits=HttpLimits(max_connections=2, drops_waiting=True))
    await first.send(sent)
    second = Client(beside=first)

    third = Client(beside=first)

    assert first.transport.is_aborted
    assert not second.transport.is_closed
    assert await third.send(PLAIN) == [(200, b"POST /plain abc")]


async def test_a_connection_that_is_being_answered_makes_no_room() -> None:
    """A new one is refused then, as where none may be dropped."""
    busy = Client(limits=HttpLimits(max_connections=1, drops_waiting=True))
    busy.connection.data_received(PLAIN)  # its handler has not run yet
    idle = Client(limits=HttpLimits(max_connections=1))

    refused = [Client(beside=busy), Client(beside=idle)]

    for client in refused:
        assert [status for status, _ in responses(client.transport.take())] == [503]
    await busy.settle()
    assert responses(busy.transport.take()) == [(200, b"POST /plain abc")]
    assert not idle.transport.is_closed
