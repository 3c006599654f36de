"""Our gRPC client with h2 as its peer: messages both ways, and every way that a stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest

from splitserve.wire.grpc.client import Address, StreamCall, open_stream
from splitserve.wire.grpc.messages import CallError
from splitserve.wire.http2.connection import STREAM_WINDOW
from tests.wire.fakes import framed

OPENED = [(":status", "200"), ("content-type", "application/grpc"), ("greeting", "hello")]


class H2Server(asyncio.Protocol):
    """h2 as a server of one stream, driven by a test."""

    def __init__(self) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.events: list[Any] = []
        self.is_lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.events += self.h2.receive_data(data)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def flush(self) -> None:
        self.transport.write(self.h2.data_to_send())

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]

    @property
    def body(self) -> bytes:
        return b"".join(each.data for each in self.of(h2.events.DataReceived))


async def until(claim: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def stream(max_message_bytes: int = 10_000_000) -> AsyncIterator[tuple[StreamCall, H2Server, list[bytes]]]:
    """An open stream, its peer, and the messages received."""
    servers: list[H2Server] = []
    messages: list[bytes] = []

    def make() -> H2Server:
        servers.append(H2Server())
        return servers[-1]

    listening = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        call = await open_stream(
            Address(f"ipv4:127.0.0.1:{port}"),
            "/test.Test/Stream",
            messages.append,
            authority="somewhere:1",
            max_message_bytes=max_message_bytes,
            metadata=(("authorization", "Bearer x"),),
        )
        await until(lambda: servers and servers[0].of(h2.events.RequestReceived))
        yield call, servers[0], messages
        call.cancel()
        await until(lambda: servers[0].is_lost)


async def test_messages_go_both_ways() -> None:
    """Method, authority and metadata are sent; messages are reassembled, however they are cut."""
    async with stream() as (call, server, messages):
        (request,) = server.of(h2.events.RequestReceived)
        assert {(":path", "/test.Test/Stream"), (":authority", "somewhere:1"), ("authorization", "Bearer x")} <= set(
            request.headers
        )
        server.h2.send_headers(1, OPENED)
        for byte in framed(b"one") + framed(b"") + framed(b"three"):
            server.h2.send_data(1, bytes([byte]))
        server.flush()
        assert (await call.initial_metadata)[b"greeting"] == b"hello"

        call.write(b"four")
        call.write(b"five")

        await until(lambda: len(messages) == 3 and server.body == framed(b"four") + framed(b"five"))
        assert messages == [b"one", b"", b"three"]


async def test_a_message_waits_for_its_window() -> None:
    """h2's window is 65,535 bytes and grows by WINDOW_UPDATE. More can be queued meanwhile, in order."""
    message = bytes(range(256)) * 2_000
    async with stream() as (call, server, _):
        call.write(message)
        call.write(b"next")
        await until(lambda: len(server.body) == 65_535)
        while len(server.body) < len(framed(message) + framed(b"next")):
            n_before = len(server.body)
            for number in (0, 1):
                server.h2.increment_flow_control_window(20_000, stream_id=number or None)
            server.flush()
            await until(lambda n=n_before: len(server.body) > n)

        assert server.body == framed(message) + framed(b"next")


async def test_windows_are_returned_for_a_long_response() -> None:
    """More than a window of it."""
    message = bytes(STREAM_WINDOW + 1_000_000)
    async with stream() as (call, server, messages):
        server.h2.send_headers(1, OPENED)
        rest = framed(message)
        while rest:
            await until(lambda: server.h2.local_flow_control_window(1) > 0)
            room = min(server.h2.local_flow_control_window(1), server.h2.max_outbound_frame_size)
            server.h2.send_data(1, rest[:room])
            server.flush()
            rest = rest[room:]
        await until(lambda: messages)

        assert messages == [message]
        assert not call.status.done()


def refuse(server: H2Server) -> None:
    trailers = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12"), ("grpc-message", "n%C3%A4h")]
    server.h2.send_headers(1, trailers, end_stream=True)


def finish(server: H2Server) -> None:
    server.h2.send_headers(1, OPENED)
    server.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)


def answer_as_a_web_server(server: H2Server) -> None:
    server.h2.send_headers(1, [(":status", "503")], end_stream=True)


def end_without_a_status(server: H2Server) -> None:
    server.h2.send_headers(1, OPENED)
    server.h2.send_data(1, b"", end_stream=True)


def reset(server: H2Server) -> None:
    server.h2.reset_stream(1, h2.errors.ErrorCodes.REFUSED_STREAM)


def leave(server: H2Server) -> None:
    server.h2.close_connection(last_stream_id=0)


def hang_up(server: H2Server) -> None:
    server.transport.abort()


def send_too_much(server: H2Server) -> None:
    server.h2.send_headers(1, OPENED)
    server.h2.send_data(1, framed(bytes(2_000)))


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (refuse, "UNIMPLEMENTED", "näh"),
        (finish, "OK", ""),
        (answer_as_a_web_server, "UNAVAILABLE", "HTTP status 503"),
        (end_without_a_status, "INTERNAL", "the stream ended without a status"),
        (reset, "UNAVAILABLE", "the stream was reset with code 7"),
        (leave, "UNAVAILABLE", "the server accepts no calls"),
        (hang_up, "UNAVAILABLE", "connection lost"),
        (send_too_much, "RESOURCE_EXHAUSTED", "Received message larger than max (2000 vs. 1000)"),
    ],
)
async def test_how_a_stream_ends_is_its_status(act: Callable[[H2Server], None], code: str, words: str) -> None:
    """Nothing can be sent any more, and the connection is closed."""
    async with stream(max_message_bytes=1_000) as (call, server, _):
        act(server)
        if not server.transport.is_closing():
            server.flush()
        ended = await asyncio.wait_for(call.status, 20)

        assert (ended.code, ended.message) == (code, words)
        with pytest.raises(CallError):
            call.write(b"x")


async def test_a_message_that_is_too_large_is_not_sent() -> None:
    """And the stream goes on."""
    async with stream(max_message_bytes=10) as (call, server, _):
        with pytest.raises(CallError) as raised:
            call.write(bytes(11))
        call.write(bytes(10))

        await until(lambda: server.body == framed(bytes(10)))
        assert raised.value.code == "RESOURCE_EXHAUSTED"


async def test_a_call_goes_on_after_goaway() -> None:
    """Calls in flight are answered; the owner of the stream is notified to open another one."""
    async with stream() as (call, server, messages):
        server.h2.send_headers(1, OPENED)
        server.flush()
        await call.initial_metadata
        server.transport.write(b"\0\0\x08\x07\0\0\0\0\0\x7f\xff\xff\xff\0\0\0\0")  # GOAWAY, as gRPC servers send it first
        await asyncio.wait_for(call.goaway.wait(), 20)

        call.write(b"last")
        call.half_close()
        await until(lambda: server.of(h2.events.StreamEnded))
        server.h2.send_data(1, framed(b"answer"))
        server.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)
        server.flush()

        assert (await asyncio.wait_for(call.status, 20)).code == "OK"
        assert (server.body, messages) == (framed(b"last"), [b"answer"])


async def test_cancelling_resets_the_stream() -> None:
    """The server stops its work."""
    async with stream() as (call, server, _):
        call.cancel()

        await until(lambda: server.of(h2.events.StreamReset))
        assert (await call.status).code == "CANCELLED"


async def test_a_silent_server_is_pinged_and_then_aborted() -> None:
    """After an unanswered keepalive PING."""
    async with stream() as (call, server, _):
        server.transport.pause_reading()
        now = asyncio.get_running_loop().time()
        call.tick(now)
        for later in range(10):
            call.tick(now + later)

        assert (await asyncio.wait_for(call.status, 20)).code == "UNAVAILABLE"
        server.transport.resume_reading()


@pytest.mark.parametrize(
    ("name", "host", "port", "path"),
    [
        ("ipv4:10.0.0.1:80", "10.0.0.1", 80, None),
        ("ipv6:[::1]:8021", "::1", 8021, None),
        ("unix:/run/x.sock", "localhost", 0, "/run/x.sock"),
        ("unix:///run/x.sock", "localhost", 0, "/run/x.sock"),
    ],
)
def test_targets_of_one_address(name: str, host: str, port: int, path: str | None) -> None:
    """Source: gRPC, doc/naming.md."""
    address = Address(name)

    assert (address.host, address.port, address.path) == (host, port, path)


@pytest.mark.parametrize("name", ["xds:///predict", "dns:///predict:1", "ipv4:10.0.0.1", "predict:8021", ""])
def test_other_targets_are_refused(name: str) -> None:
    """Calls to them are unary, through grpc.aio."""
    with pytest.raises(ValueError, match="not the name of one address"):
        Address(name)
