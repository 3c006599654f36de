"""gRPC on an event loop without grpcio, with h2 as the server: how many calls at once, and every way in which one ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import h2.config
import h2.connection
import h2.events
import h2.settings
import numpy as np
import pytest

from splitserve import AsyncClient
from splitserve.api.inference import inference_pb2 as pb
from splitserve.client import over_grpc, over_own_grpc
from splitserve.client.connection import connection_options
from splitserve.errors import DeadlineExceeded, Internal, TooLarge, Unavailable
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, serving, signature
from tests.wire.fakes import framed

LIVE = framed(pb.ServerLiveResponse(live=True).SerializeToString())
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


class H2Peer:
    """A server that leaves what it answers to a test."""

    def __init__(self, **settings: int) -> None:
        self.settings = {h2.settings.SettingCodes[name.upper()]: value for name, value in settings.items()}
        self.connections: list[_H2Connection] = []

    @property
    def last(self) -> _H2Connection:
        return self.connections[-1]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        def make() -> _H2Connection:
            self.connections.append(_H2Connection(self.settings))
            return self.last

        async with await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for each in self.connections:
                each.transport.abort()


class _H2Connection(asyncio.Protocol):
    def __init__(self, settings: dict[Any, int]) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._settings = settings
        self.asked: list[int] = []
        self.headers: dict[int, dict[str, str]] = {}
        self.resets: dict[int, int] = {}
        self.is_lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=self._settings)
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.headers[event.stream_id] = dict(event.headers)
            elif isinstance(event, h2.events.StreamEnded):
                self.asked.append(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.resets[event.stream_id] = int(event.error_code)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def flush(self) -> None:
        self.transport.write(self.h2.data_to_send())

    def answer_all(self) -> None:
        """Answer what was asked, except for what was cancelled or answered."""
        while self.asked:
            stream = self.asked.pop()
            if stream not in self.resets:
                self.answer(stream)

    def answer(self, stream: int, *, status: str = "0") -> None:
        self.h2.send_headers(stream, HEADERS)
        self.h2.send_data(stream, LIVE)
        self.h2.send_headers(stream, [("grpc-status", status)], end_stream=True)
        self.flush()


async def until(claim: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_no_more_calls_are_in_flight_than_the_server_allows() -> None:
    """The others wait for their turn, on the same connection."""
    peer = H2Peer(max_concurrent_streams=2)
    async with peer.listening() as address, AsyncClient(address) as client:
        calls = [asyncio.create_task(client.is_live()) for _ in range(5)]
        for n_answered in range(5):
            await until(lambda n=n_answered: len(peer.connections) == 1 and len(peer.last.asked) == min(n + 2, 5))
            peer.last.answer(peer.last.asked[n_answered])

        assert await asyncio.gather(*calls) == [True] * 5


async def test_a_call_that_is_cancelled_gives_its_turn_away() -> None:
    """Whether it waited, was in flight, or had just been given the turn."""
    peer = H2Peer(max_concurrent_streams=1)
    async with peer.listening() as address, AsyncClient(address) as client:
        first = asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and peer.last.asked)
        peer.last.asked.clear()
        second, third, last = (asyncio.create_task(client.is_live()) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        asyncio.get_running_loop().call_soon(third.cancel)  # after the first has ended, before the third goes on
        await until(lambda: peer.last.answer_all() or last.done())

        assert await last
        assert peer.last.resets[1] == 8  # CANCEL


async def test_calls_that_a_stopping_server_did_not_take_are_made_on_another_connection() -> None:
    """Those that it took are answered on the first."""
    peer = H2Peer()
    async with peer.listening() as address, AsyncClient(address) as client:
        taken, refused = asyncio.create_task(client.is_live()), asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and len(peer.last.asked) == 2)
        first = peer.last
        first.transport.write(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00")  # GOAWAY after stream 1
        await until(lambda: len(peer.connections) == 2 and peer.last.asked)
        peer.last.answer(1)
        assert await refused
        first.answer(1)

        assert await taken
        await until(lambda: first.is_lost)


async def test_a_call_without_an_answer_ends_at_its_deadline_and_the_connection_stays() -> None:
    """Its stream is reset; the server was told the deadline."""
    peer = H2Peer()
    async with peer.listening() as address, AsyncClient(address, timeout_s=60) as client:
        ready = asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and peer.last.asked)
        peer.last.answer(1)
        await ready
        with pytest.raises(DeadlineExceeded, match="did not answer in time"):
            await client.infer("echo", {"x": [[1]]}, timeout_s=0.05)
        await until(lambda: peer.last.resets)

        assert peer.last.headers[3]["grpc-timeout"].endswith("m")
        assert len(peer.connections) == 1


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_connection_that_breaks_is_reported_and_retried_only_before_an_answer(has_begun: bool) -> None:
    """Once an answer has begun, the model may have worked."""
    peer = H2Peer()
    async with peer.listening() as address, AsyncClient(address, max_attempts=2) as client:
        call = asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and peer.last.asked)
        if has_begun:
            peer.last.h2.send_headers(1, HEADERS)
            peer.last.flush()
            used = client._here().transport._current  # type: ignore[attr-defined]
            await until(lambda: next(iter(used._streams.values())).is_begun)
        peer.last.transport.close()
        if has_begun:
            with pytest.raises(Unavailable, match=f"{address}: it closed the connection"):
                await call
            return
        await until(lambda: len(peer.connections) == 2 and peer.last.asked)
        peer.last.answer(1)

        assert await call


async def test_a_server_that_breaks_http2_is_reported() -> None:
    """By the rule that it broke."""
    peer = H2Peer()
    async with peer.listening() as address, AsyncClient(address, max_attempts=1) as client:
        call = asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and peer.last.asked)
        peer.last.transport.write(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # WINDOW_UPDATE of 0

        with pytest.raises(Unavailable, match="WINDOW_UPDATE of 0"):
            await call


@pytest.mark.parametrize(
    ("headers", "kind", "message"),
    [
        ([(":status", "503")], Unavailable, "503"),
        ([(":status", "404")], Unavailable, "no gRPC server.*404"),
        ([(":status", "200"), ("content-type", "text/html")], Unavailable, "no gRPC server.*text/html"),
        ([*HEADERS, ("grpc-status", "0")], Internal, "no message"),
    ],
)
async def test_answers_that_are_not_grpc_are_reported_as_that(headers: Any, kind: type[Exception], message: str) -> None:
    """As proxies send them."""
    peer = H2Peer()
    async with peer.listening() as address, AsyncClient(address, max_attempts=1) as client:
        call = asyncio.create_task(client.is_live())
        await until(lambda: peer.connections and peer.last.asked)
        peer.last.h2.send_headers(1, headers, end_stream=True)
        peer.last.flush()

        with pytest.raises(kind, match=message):
            await call


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_large_messages_pass_the_windows_of_a_foreign_server(compression: Any) -> None:
    """grpcio's are 64 KiB at first, and it compresses its answers as it was asked."""
    service = FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 1000))]))
    rows = np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)

    async def infer(request: Any, context: Any) -> Any:
        answer = pb.ModelInferResponse(model_name="echo", model_version="1")
        answer.outputs.add(name="x", datatype="FP32", shape=[3000, 1000])
        answer.raw_output_contents.extend(request.raw_input_contents)
        return answer

    async def metadata(request: Any, context: Any) -> Any:
        answer = pb.ModelMetadataResponse(name="echo", platform="test")
        answer.inputs.add(name="x", datatype="FP32", shape=[-1, 1000])
        return answer

    server = grpc.aio.server(compression=grpc.Compression.Gzip, options=[("grpc.max_receive_message_length", -1)])
    methods = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(
            infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
        ),
        "ModelMetadata": grpc.unary_unary_rpc_method_handler(
            metadata, pb.ModelMetadataRequest.FromString, pb.ModelMetadataResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}", compression=compression) as client:
        answer = await client.infer("echo", rows, chunk_rows=0)
    await server.stop(None)
    async with serving(service) as address, AsyncClient(address, max_message_bytes=1_000_000) as client:
        with pytest.raises(TooLarge, match="max_message_bytes"):
            await client.infer("echo", rows, chunk_rows=0)

    np.testing.assert_array_equal(answer["x"], rows)


async def test_a_name_with_several_addresses_is_balanced_by_grpcio(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, it is not used."""
    service = FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 1))]))
    found = 1

    async def addresses(endpoint: Any) -> Any:
        return [(socket.AF_INET, 0, 0, "", (f"127.0.0.{last}", endpoint.port)) for last in range(1, found + 1)]

    monkeypatch.setattr(over_own_grpc, "addresses", addresses)
    monkeypatch.setattr(over_own_grpc, "_is_name", lambda _: True)
    async with serving(service) as address:
        for found in (1, 2):
            async with AsyncClient(address) as client:
                assert await client.is_live()
                balanced = client._here().transport._balanced  # type: ignore[attr-defined]
                assert (balanced is not None) == (found == 2)


@pytest.mark.parametrize(
    ("target", "options", "is_own"),
    [
        ("127.0.0.1:1", {}, True),
        ("dns:///name:1", {}, True),
        ("[::1]:1", {}, True),
        ("unix:/run/socket", {}, True),
        ("dns://8.8.8.8/name:1", {}, False),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", {}, False),
        ("xds:///name:1", {}, False),
        ("127.0.0.1:1", {"proxy": "http://proxy:3128"}, False),
    ],
)
async def test_grpcio_is_used_where_only_it_knows_how(target: str, options: Any, is_own: bool) -> None:
    """Its own names, proxies."""
    made = connection_options(target, tls=None, compression=None, max_message_bytes=1, headers=None, **options)
    transport = over_grpc.async_transport(made, None)
    await transport.close()

    assert isinstance(transport, over_own_grpc.AsyncOwnGrpcTransport) is is_own


def test_the_end_of_a_connection_is_noticed_although_no_event_loop_ran() -> None:
    """A program that calls ``run_until_complete`` now and then: the next call opens another connection, and loses no attempt."""
    with asyncio.Runner() as servers, asyncio.Runner() as runner:
        peer = H2Peer()

        async def listen() -> Any:
            context = peer.listening()
            return context, await context.__aenter__()

        # Both event loops run in turn, in this thread: steps of the client's call are made until it waits.
        context, address = servers.run(listen())
        client = AsyncClient(address, max_attempts=1)

        def call() -> bool:
            task = runner.get_loop().create_task(client.is_live())
            while not task.done():
                runner.run(asyncio.sleep(0.001))
                servers.run(asyncio.sleep(0.001))
                for connection in peer.connections[-1:]:
                    connection.answer_all()
            return task.result()

        assert call()
        peer.last.transport.abort()
        servers.run(asyncio.sleep(0.001))
        assert call()
        assert len(peer.connections) == 2
        runner.run(client.close())
        servers.run(context.__aexit__(None, None, None))
