"""Fuzzed connections: all the bytes of an HTTP/2 or HTTP/1.1 connection, and header blocks.

The first byte of a connection's input is the size of the pieces that it arrives in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import hpack

from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.client import StreamCall
from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpLimits, HttpListener
from splitserve.wire.http1.messages import Handled, HttpRequest, HttpResponse, Respond
from splitserve.wire.http2 import frames as h2
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.headers import HeaderDecoder, Headers
from tests.wire.fakes import FakeServer, FakeTransport, Frame, raw_frames
from tests.wire.fakes import RawClient as RawHttp2Client

T = TypeVar("T")

MAX_PIECES = 50


def frames(data: bytes) -> None:
    """What a client sends behind its preface and SETTINGS, to our HTTP/2 server connection."""
    asyncio.run(_strict(_frames(data[:1], data[1:])))


async def _frames(size: bytes, data: bytes) -> None:
    server = FakeServer()
    client = RawHttp2Client(server)
    if size and size[0] & 1:
        server.gate.set()
    await client.send(h2.PREFACE + h2.settings({}))
    for piece in _pieces(size, data):
        await client.send(piece)
    server.gate.set()
    await client.send()
    _check_sent(client.received)
    client.connection.connection_lost(None)
    await asyncio.sleep(0)
    assert server.budget.used == 0
    assert not client.connection._streams
    assert not server.connections


def _check_sent(sent: list[Frame]) -> None:
    """Blocks can be decoded, and nothing but RST_STREAM comes on a stream that has ended."""
    ended = set()
    for kind, flags, stream, payload in sent:
        assert kind in (h2.DATA, h2.HEADERS, h2.RST_STREAM, h2.SETTINGS, h2.PING, h2.GOAWAY, h2.WINDOW_UPDATE)
        if kind == h2.HEADERS:
            hpack.Decoder(10**6).decode(payload, raw=True)
        if kind in (h2.HEADERS, h2.DATA, h2.WINDOW_UPDATE):
            assert stream not in ended
        if kind == h2.RST_STREAM or (kind in (h2.HEADERS, h2.DATA) and flags & h2.END_STREAM):
            ended.add(stream)


def client(data: bytes) -> None:
    """What a server sends behind its SETTINGS, to our HTTP/2 client connection."""
    asyncio.run(_strict(_client(data[:1], data[1:])))


async def _client(size: bytes, data: bytes) -> None:
    transport = FakeTransport()
    call = StreamCall(lambda _: None, 100_000)
    call.connection_made(transport)
    call.start("/test.Test/Stream", "test", "http", ())
    call.write(b"x" * 70_000)
    call.data_received(h2.settings({}) + h2.frame(h2.SETTINGS, h2.ACK, 0))
    for piece in _pieces(size, data):
        call.data_received(piece)
        await asyncio.sleep(0)
    raw_frames(transport.take()[len(h2.PREFACE) :])
    call.connection_lost(None)
    assert call.status.done()
    assert call.initial_metadata.done()


def headers(data: bytes) -> None:
    """Header blocks of one connection, each behind its length: our caches give what hpack gives without them."""
    blocks = []
    while data:
        blocks.append(data[1 : 1 + data[0]])
        data = data[1 + data[0] :]
    for has_table in (True, False):
        ours: HeaderDecoder[Headers] = HeaderDecoder(lambda found: found, 10**6)
        theirs = hpack.Decoder(10**6)
        if not has_table:
            ours.disable_dynamic_table()
            theirs.max_allowed_table_size = theirs.header_table_size = 0
        for block in [*blocks, *blocks]:
            expected = _decoded(theirs, block)
            try:
                found = ours.decode(block)
            except Http2ConnectionError:
                assert expected is None
                break
            assert found == expected


def _decoded(decoder: hpack.Decoder, block: bytes) -> Headers | None:
    try:
        return [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
    except hpack.HPACKError:
        return None


def http1(data: bytes) -> None:
    """What a client sends to our HTTP/1.1 connection: the responses are the same however the bytes are cut."""
    size, data = data[:1], data[1:]
    whole = asyncio.run(_strict(_http1([data])))
    assert asyncio.run(_strict(_http1(_pieces(size, data)))) == whole


async def _http1(pieces: list[bytes]) -> bytes:
    transport = _Http1Transport()
    budget = ByteBudget(10**6)

    def handle(request: HttpRequest, respond: Respond) -> Handled:
        return _echo(request)

    listener = HttpListener(handle, HttpLimits(), max_body_bytes=1_000, budget=budget)
    connection = Http1Connection(listener)
    connection.connection_made(transport)
    listener.head(200, "application/json")
    for piece in pieces:
        connection.data_received(piece)
        await asyncio.sleep(0)
    for _ in range(3 + 4 * sum(piece.count(b"HTTP/1.") for piece in pieces)):
        await asyncio.sleep(0)
    connection.connection_lost(None)
    for _ in range(3):
        await asyncio.sleep(0)
    assert budget.used == 0
    lines = transport.take().replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.startswith(b"date:"))


async def _echo(request: HttpRequest) -> HttpResponse:
    try:
        return HttpResponse(200, request.path.encode() + b" " + await request.body.read())
    except Exception:
        return HttpResponse(413, b"")


class _Http1Transport(FakeTransport):
    """Takes everything at once."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0


async def _strict(run: Coroutine[Any, Any, T]) -> T:
    """An exception in a callback of the event loop is one here."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    result = await run
    assert not failures, failures
    return result


def _pieces(size: bytes, data: bytes) -> list[bytes]:
    """Pieces of this many bytes, but at most `MAX_PIECES`; 0 is all at once."""
    step = max((size[0] if size else 0) or len(data), len(data) // MAX_PIECES, 1)
    return [data[at : at + step] for at in range(0, len(data), step)]
