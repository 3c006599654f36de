"""The environment of one of our connections in a test: a transport that keeps what is written, a server with methods that echo,
hold and fail, and frames as tuples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import hpack

from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.call import MethodHandler, ServerCall
from splitserve.wire.grpc.messages import PREFIX, CallError
from splitserve.wire.grpc.server import GrpcServerConnection, ServerLimits
from splitserve.wire.http2 import frames
from splitserve.wire.listening import Connections

ECHO, STREAM, HOLD, FAIL = "/test.Test/Echo", "/test.Test/Stream", "/test.Test/Hold", "/test.Test/Fail"


Frame = tuple[int, int, int, bytes]
"""Type, flags, stream and payload."""


class FakeTransport:
    """Keeps what is written, until it is taken."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.n_writes = 0
        self.is_closed = self.is_aborted = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data
        self.n_writes += 1

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def take(self) -> bytes:
        data = bytes(self.written)
        self.written.clear()
        return data


class FakeServer:
    """What a connection knows of its server: methods that echo, hold and fail."""

    def __init__(self, limits: ServerLimits | None = None, max_held_bytes: int = 10**9) -> None:
        self.limits = limits or ServerLimits()
        self.budget = ByteBudget(max_held_bytes)
        self.new_reservation = self.budget.reservation
        self.connections: Connections = Connections()
        self.calls: list[ServerCall] = []
        self.gate = asyncio.Event()
        self.n_cancelled = 0
        self.handlers = {
            ECHO: MethodHandler(unary=self._echo),
            HOLD: MethodHandler(unary=self._hold),
            FAIL: MethodHandler(unary=self._fail),
            STREAM: MethodHandler(streaming=self._stream),
        }

    def status_of(self, error: Exception) -> CallError:
        return CallError("INTERNAL", str(error), (("x-bin", b"\x00\xff"),))

    async def _echo(self, data: bytes, call: ServerCall) -> bytes:
        self.calls.append(call)
        return data

    async def _hold(self, data: bytes, call: ServerCall) -> bytes:
        self.calls.append(call)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        return data

    async def _fail(self, data: bytes, call: ServerCall) -> bytes:
        raise ValueError("50 % of nothing, naïvely")

    async def _stream(self, call: ServerCall) -> None:
        """Echo each message, once the gate is open."""
        self.calls.append(call)
        call.send_initial_metadata((("greeting", "hello"),))
        try:
            while (data := await call.read()) is not None:
                await self.gate.wait()
                await call.write(data)
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise


class RawClient:
    """Frames, as a test writes them, to one `GrpcServerConnection`, and the frames that it sends."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.transport = FakeTransport()
        self.connection = GrpcServerConnection(server)  # type: ignore[arg-type]
        self.connection.connection_made(self.transport)
        self.received: list[Frame] = []

    async def send(self, *data: bytes) -> list[Frame]:
        """What the connection answers to these bytes, PINGs acknowledged."""
        for each in data:
            self.connection.data_received(each)
        before = len(self.received)
        for _ in range(10):
            await asyncio.sleep(0)
            for each in raw_frames(self.transport.take()):
                self.received.append(each)
                if each[0] == frames.PING and not each[1] & frames.ACK and not self.transport.is_closed:
                    self.connection.data_received(frames.frame(frames.PING, frames.ACK, 0, each[3]))
        return self.received[before:]

    async def tick(self, seconds: float) -> list[Frame]:
        """What it does by itself at a time from now."""
        self.connection.tick(self.connection.now() + seconds)
        return await self.send()


def trailers_of(received: list[Frame], stream: int) -> dict[bytes, bytes]:
    """All headers and trailers on a stream. Our server's blocks need no table."""
    found: dict[bytes, bytes] = {}
    for kind, _, number, payload in received:
        if kind == frames.HEADERS and number == stream:
            found.update((bytes(name), bytes(value)) for name, value in hpack.Decoder().decode(payload, raw=True))
    return found


def goaways(received: list[Frame]) -> list[tuple[int, int]]:
    """Last stream and code of each GOAWAY."""
    return [frames.GOAWAY_FIELDS.unpack_from(payload) for kind, _, _, payload in received if kind == frames.GOAWAY]


def request_headers(path: str, **headers: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *((name.replace("_", "-"), value) for name, value in headers.items()),
    ]


def framed(message: bytes, *, is_compressed: bool = False) -> bytes:
    return PREFIX.pack(is_compressed, len(message)) + message


async def until(claim: Callable[[], bool], step: Callable[[], Awaitable[None]]) -> None:
    """Go on until a claim holds."""
    for _ in range(10_000):
        if claim():
            return
        await step()
    raise AssertionError("it does not come to hold")


def raw_frames(data: bytes) -> list[Frame]:
    """Whole frames."""
    found, at = [], 0
    while at < len(data):
        high, low, kind, flags, stream = frames.FRAME_HEADER.unpack_from(data, at)
        at += frames.FRAME_HEADER_SIZE + (high << 8 | low)
        found.append((kind, flags, stream, data[at - (high << 8 | low) : at]))
    assert at == len(data)
    return found
