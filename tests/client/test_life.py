"""Clients that are closed, copied, pickled, shown, used in several threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

import splitserve
from splitserve import AsyncClient, Client
from splitserve.client import ClientClosed, over_grpc
from splitserve.errors import DeadlineExceeded, InvalidInput
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from tests.client.scripted import X, answer, http, scripted
from tests.client.ways import Way

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2)), TensorSpec("t", "BYTES", ("batch", 1))])
ROW = {"x": [[1, 2]], "t": ["a"]}


async def test_a_closed_client_says_so(way: Way) -> None:
    """Whether or not it was used before."""
    async with way.serving(FakeInference(ECHO)) as address:
        async with way.at(address) as client:
            await client.infer("echo", ROW)
        with pytest.raises(ClientClosed, match=f"{address}.*was closed; make another one"):
            await client.infer("echo", ROW)
        with pytest.raises(ClientClosed):
            await client.is_live()


async def test_a_client_is_pickled_and_copied_as_its_arguments(way: Way) -> None:
    """The copy has connections of its own, and outlives the original."""
    async with way.serving(FakeInference(ECHO)) as address:
        async with way.at(address, timeout_s=7, headers={"a": "b"}) as caller:
            await caller.infer("echo", ROW)
            copies = [pickle.loads(pickle.dumps(caller._client)), copy.copy(caller._client), copy.deepcopy(caller._client)]
        for each in copies:
            assert (each._arguments["timeout_s"], each._arguments["headers"]) == (7, {"a": "b"})
            if way.is_async:
                assert (await each.infer("echo", ROW))["x"].tolist() == [[1, 2]]
                await each.close()
            else:
                assert (await asyncio.to_thread(each.infer, "echo", ROW))["x"].tolist() == [[1, 2]]
                each.close()


def test_a_client_of_the_callers_connection_cannot_be_pickled() -> None:
    """The message says what to do."""
    with (
        httpx.Client() as http,
        Client("http://127.0.0.1:1", http_client=http) as client,
        pytest.raises(TypeError, match=r"http_client.*make one where it is used"),
    ):
        pickle.dumps(client)


async def test_an_async_client_works_in_one_event_loop_after_another(way: Way) -> None:
    """As with several calls of ``asyncio.run``; and in two at once."""
    async with way.serving(FakeInference(ECHO)) as address:
        client = AsyncClient(address)

        def run() -> Any:
            return asyncio.run(_infer(client))

        in_turn = [await asyncio.to_thread(run) for _ in range(2)]
        at_once = await asyncio.gather(*(asyncio.to_thread(run) for _ in range(3)), _infer(client))
        await client.close()

    assert [each["x"].tolist() for each in (*in_turn, *at_once)] == [[[1, 2]]] * 6


async def _infer(client: AsyncClient) -> Any:
    return await client.infer("echo", ROW)


async def test_a_client_serves_64_threads(way: Way) -> None:
    """All of which call at the same moment."""
    if way.is_async:
        pytest.skip("threads call the blocking client")
    barrier = threading.Barrier(64)

    def call(client: Client, number: int) -> float:
        barrier.wait()
        return float(client.infer("echo", {"x": [[number, 2]], "t": ["a"]})["x"][0, 0])

    async with way.serving(FakeInference(ECHO)) as address:
        with Client(address) as client, ThreadPoolExecutor(64) as pool:
            loop = asyncio.get_running_loop()
            found = await asyncio.gather(*(loop.run_in_executor(pool, call, client, number) for number in range(64)))

    assert found == list(range(64))


def test_a_client_is_shown_with_its_address_and_state() -> None:
    """In logs and notebooks."""
    client = Client("http://127.0.0.1:1")
    assert repr(client) == "<Client http://127.0.0.1:1>"
    client.close()

    assert repr(client) == "<Client http://127.0.0.1:1, closed>"
    assert repr(AsyncClient("127.0.0.1:1")) == "<AsyncClient grpc://127.0.0.1:1>"


def test_completion_knows_what_is_public() -> None:
    """``dir`` of the package: also what was not imported yet, and nothing else."""
    assert {name for name in dir(splitserve) if not name.startswith("__")} == set(splitserve.__all__)


async def test_text_is_str_unless_bytes_are_wanted(way: Way) -> None:
    """So that a comparison with text is true, and JSON can hold it."""
    async with way.serving(FakeInference(ECHO)) as address, way.at(address) as client, way.at(address, text=bytes) as raw:
        text, data = await client.infer("echo", ROW), await raw.infer("echo", ROW)
        image = await client.infer("echo", {**ROW, "t": [b"\xff"]})

    assert (text["t"] == "a").all()
    assert data["t"].tolist() == [[b"a"]]
    assert image["t"].tolist() == [[b"\xff"]]


async def test_arrays_can_be_written_to(way: Way) -> None:
    """Whatever their datatype."""
    async with way.to(FakeInference(ECHO)) as client:
        result = await client.infer("echo", ROW)

    for array in result.values():
        assert array.flags.writeable
        array[:] = array[::-1]


async def test_the_id_and_headers_of_a_call_are_sent(way: Way) -> None:
    """Beside those of the client, which may be a function; the answer has the id."""
    service = FakeInference(ECHO)

    async with way.to(service, headers=lambda: {"x-team": "birds"}) as client:
        result = await client.infer("echo", ROW, request_id="r-1", headers={"x-user": "7"})

    assert service.requests[0].id == "r-1"
    assert result.id == "r-1"


async def test_headers_of_a_call_go_out_with_it(rest: Way) -> None:
    """The id as X-Request-Id, and who calls as User-Agent."""
    async with scripted(answer(1)) as server, rest.at(server.url, headers=lambda: {"X-Team": "birds"}) as client:
        await client.infer("echo", X, request_id="r-1", headers={"X-User": "7"}, version=3, timeout_s=float("inf"))

    headers = server.asked[-1].headers
    assert (headers["x-team"], headers["x-user"], headers["x-request-id"]) == ("birds", "7", "r-1")
    assert headers["user-agent"] == f"splitserve/{splitserve.__version__}"
    assert "request-timeout" not in headers
    assert server.asked[-1].path == "/v2/models/echo/versions/3/infer"


async def test_a_client_without_a_time_limit(way: Way) -> None:
    """None and infinity; a call can have its own."""
    for timeout_s in (None, float("inf")):
        async with way.to(FakeInference(ECHO), timeout_s=timeout_s) as client:
            result = await client.infer("echo", ROW)
            with pytest.raises(DeadlineExceeded):
                await client.infer("echo", ROW, timeout_s=1e-9)
        np.testing.assert_array_equal(result["x"], [[1, 2]])


async def test_the_callers_own_connection_is_used_and_stays_open(way: Way) -> None:
    """An httpx client or a gRPC channel, with what the application has put into it."""
    import grpc

    if way.is_other:
        pytest.skip("the channel decides")
    async with way.serving(FakeInference(ECHO)) as address:
        if way.is_rest:
            http = httpx.AsyncClient() if way.is_async else httpx.Client()
            async with way.at(address, http_client=http) as client:
                result = await client.infer("echo", ROW)
            assert not http.is_closed
            await http.aclose() if way.is_async else http.close()
        else:
            channel = grpc.aio.insecure_channel(address) if way.is_async else grpc.insecure_channel(address)
            async with way.at(address, channel=channel) as client:
                result = await client.infer("echo", ROW)
            async with way.at(address, channel=channel) as client:
                assert await client.is_live()
            await channel.close() if way.is_async else channel.close()

    assert result["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"a b": "x"}, "a b"),
        ({"": "x"}, "its name"),
        ({":path": "x"}, ":path"),
        ({"a": "b\r\nc: d"}, '"a": its value'),
        ({"a": 1}, '"a": expected str, got int'),
        ({"a": b"x"}, '"a": expected str, got bytes'),
        ({"Content-Length": "3"}, '"content-length" is set by the client'),
        ({"grpc-timeout": "1S"}, '"grpc-timeout" is set by the client'),
    ],
)
async def test_headers_that_cannot_be_sent_are_refused_over_all_transports(way: Way, headers: Any, message: str) -> None:
    """By their names, before anything is sent; those of the client when it is made."""
    service = FakeInference(ECHO)
    async with way.serving(service) as address:
        async with way.at(address) as client:
            with pytest.raises(InvalidInput, match=message):
                await client.infer("echo", ROW, headers=headers)
        with pytest.raises(ValueError, match=message):
            AsyncClient(address, headers=headers)

    assert not service.requests


async def test_options_of_a_call_are_checked_over_all_transports(way: Way) -> None:
    """Types that the protocol does not have are errors of the caller; numpy's scalars, one output and any id are not."""
    service = FakeInference(ECHO)
    async with way.to(service) as client:
        await client.infer("echo", ROW, parameters={"n": np.int64(3)}, outputs="x", request_id="Ä 1")
        for parameters in ({"a": [1]}, {"a": None}):
            with pytest.raises(InvalidInput, match='parameter "a": expected bool, int, float or str'):
                await client.infer("echo", ROW, parameters=parameters)
        for wrong in ({"extra": "x"}, {"timeout_s": "5"}):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
                await client.infer("echo", ROW, **wrong)
        with pytest.raises(InvalidInput, match="got NoneType"):
            await client.infer("echo", None)

    (request,) = service.requests
    assert request.parameters["n"] == 3
    assert [output.name for output in request.outputs] == ["x"]
    assert request.id == "Ä 1"


async def test_the_host_of_an_ingress_is_a_header(rest: Way) -> None:
    """Which routes by it, as that of KServe."""
    async with scripted(http(200, {"live": True})) as server, rest.at(server.url, headers={"Host": "birds.example"}) as client:
        await client.is_live()

    assert server.asked[0].headers["host"] == "birds.example"


class ConnectProxy:
    """An HTTP proxy that tunnels to one address, whatever it is asked for."""

    def __init__(self, address: str) -> None:
        self._address = address.split(":")
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        other_reader, other_writer = await asyncio.open_connection(*self._address)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(self._carry(reader, other_writer), self._carry(other_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()


async def test_a_proxy_tunnels_grpc(grpc_way: Way) -> None:
    """By CONNECT, with the credentials in the proxy's URL; the name of the server is the proxy's to resolve."""
    if grpc_way.is_other:
        pytest.skip("grpcio knows proxies")
    async with grpc_way.serving(FakeInference(ECHO)) as address:
        proxy = ConnectProxy(address)
        listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        url = f"http://user:word@127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with listening, grpc_way.at("grpc://server.invalid:8001", proxy=url, timeout_s=60) as client:
            result = await client.infer("echo", ROW)

    assert result["x"].tolist() == [[1, 2]]
    assert proxy.asked[0].startswith(b"CONNECT server.invalid:8001 HTTP/1.")
    assert b"basic dxnlcjp3b3jk" in proxy.asked[0].lower()


async def test_a_proxy_is_not_left_out_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where grpcio cannot be used."""
    monkeypatch.setattr(over_grpc, "_used_in", 0)
    client = AsyncClient("127.0.0.1:1", proxy="http://127.0.0.1:1")

    with pytest.raises(ValueError, match="proxy: .*use an http:// URL"):
        await client.is_live()
    with pytest.raises(ValueError, match="proxy: .*use an http:// URL"):
        Client("127.0.0.1:1", proxy="http://127.0.0.1:1")


async def test_a_proxy_is_asked_for_the_server(rest: Way) -> None:
    """By the server's whole URL; the name of the server is the proxy's to resolve."""
    async with scripted(http(200, {"live": True})) as proxy, rest.at("http://server.invalid", proxy=proxy.url) as client:
        assert await client.is_live()

    assert proxy.asked[0].path == "http://server.invalid/v2/health/live"


async def test_the_current_trace_is_passed_on(rest: Way) -> None:
    """Where the application has OpenTelemetry, by its own propagators."""
    from opentelemetry import context, propagate, trace

    span = trace.NonRecordingSpan(trace.SpanContext(0xA, 0xB, is_remote=False, trace_flags=trace.TraceFlags(1)))
    token = context.attach(trace.set_span_in_context(span))
    try:
        assert propagate.get_global_textmap()
        async with scripted(answer(1)) as server, rest.at(server.url) as client:
            await client.infer("echo", X)
    finally:
        context.detach(token)

    assert server.asked[-1].headers["traceparent"] == f"00-{0xA:032x}-{0xB:016x}-01"
