"""What accepts connections: none that a client has opened is lost when a server stops."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve.oip.messages import InferRequest, ServerMetadata
from splitserve.remote.inference import RemoteInference
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_face import GrpcFace
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference
from splitserve.wire import listening
from splitserve.wire.listening import Acceptor, listen, listen_unix

METADATA = ServerMetadata("test", "0")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    gc.freeze()  # what a test collects afterwards is what it has made
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


def grpc_face() -> GrpcFace:
    return GrpcFace(FakeInference(), GrpcConfig(stage="test", metadata=METADATA))


def rest_face() -> RestFace:
    config = RestConfig(metadata=METADATA, max_body_bytes=1000, default_timeout_s=10, grace_s=0)
    return RestFace(RestApp(ProxyService(FakeInference()), config))


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("make", [grpc_face, rest_face])
def test_a_connection_that_is_opened_as_the_server_stops_is_closed(
    make: Callable[[], GrpcFace | RestFace], turns: int, runner: asyncio.Runner
) -> None:
    """In any state: in the backlog, accepted, or connected."""

    async def open_and_stop() -> None:
        async with make() as face:
            client = connect(face.port)
            await turn(turns)
        await read_to_end(client)

    runner.run(open_and_stop())
    gc.collect()  # reports a socket that is not closed


class Greeting(asyncio.Protocol):
    """Greets its client."""

    def __init__(self, made: list[Any]) -> None:
        self._made = made

    def connection_made(self, transport: Any) -> None:
        self._made.append(transport)
        transport.write(b"hello")


class Port:
    """A listening socket and the connections that were made."""

    def __init__(self, socket: socket.socket, context: ssl.SSLContext | None = None) -> None:
        self.number: int = socket.getsockname()[1]
        self.made: list[Any] = []
        self.acceptor = Acceptor(socket, lambda: Greeting(self.made), context)


@asynccontextmanager
async def port(socket: socket.socket | None = None, context: ssl.SSLContext | None = None) -> AsyncIterator[Port]:
    port = Port(socket or listen("127.0.0.1", 0, shares_port=False), context)
    port.acceptor.start()
    yield port
    await port.acceptor.stop()
    for transport in port.made:
        transport.abort()


@pytest.mark.parametrize("turns", range(6))
def test_stopping_waits_until_connections_are_made(turns: int, runner: asyncio.Runner) -> None:
    """All that clients have opened before are the server's afterwards, to drain them."""

    async def open_and_stop() -> None:
        async with port() as opened:
            clients = [connect(opened.number) for _ in range(5)]
            await turn(turns)

            await opened.acceptor.stop()

            assert len(opened.made) == 5
            for client in clients:
                with closing(client):
                    assert await asyncio.get_running_loop().sock_recv(client, 100) == b"hello"

    runner.run(open_and_stop())


async def test_a_stopped_port_refuses_connections() -> None:
    async with port() as opened:
        pass

    with pytest.raises(ConnectionRefusedError):
        connect(opened.number)


async def test_stopping_waits_for_tls_handshakes(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    async with port(context=server) as opened:
        opening = asyncio.open_connection("127.0.0.1", opened.number, ssl=client)

        (reader, writer), _ = await asyncio.gather(opening, accepted_and_stopped(opened))

        assert await reader.readexactly(5) == b"hello"
        writer.transport.abort()


async def accepted_and_stopped(port: Port) -> None:
    while not port.acceptor._accepted:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await port.acceptor.stop()


async def test_a_client_without_a_tls_handshake_does_not_delay_stopping(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a grace, then its connection is closed."""
    monkeypatch.setattr(listening, "FIRST_REQUEST_GRACE_S", 0.01)
    async with port(context=contexts[0]) as silent:
        client = connect(silent.number)

    await read_to_end(client)


async def test_a_tls_handshake_that_fails_closes_its_connection_only(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    async with port(context=server) as opened:
        plain = connect(opened.number)
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        await read_to_end(plain)

        reader, writer = await asyncio.open_connection("127.0.0.1", opened.number, ssl=client)

        assert await reader.readexactly(5) == b"hello"
        writer.transport.abort()


class Scarce(socket.socket):
    """A socket whose connections cannot be accepted at first."""

    n_failures = 1

    def accept(self) -> tuple[socket.socket, Any]:
        if self.n_failures:
            self.n_failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_connections_wait_while_there_are_no_file_descriptors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are accepted later, and the log says so."""
    monkeypatch.setattr(listening, "ACCEPT_RETRY_S", 0.0)
    plain = listen("127.0.0.1", 0, shares_port=False)
    async with port(Scarce(fileno=plain.detach())) as scarce, asyncio.timeout(10):
        client = connect(scarce.number)

        with closing(client):
            assert await asyncio.get_running_loop().sock_recv(client, 100) == b"hello"

    assert "connections not accepted" in capsys.readouterr().out


async def turn(n: int) -> None:
    """Let the event loop turn ``n`` times."""
    for _ in range(n):
        await asyncio.sleep(0)


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    return client


async def read_to_end(client: socket.socket) -> None:
    """Read until the server closes the connection, or resets it."""
    loop = asyncio.get_running_loop()
    with closing(client):
        async with asyncio.timeout(10):
            try:
                while await loop.sock_recv(client, 1000):
                    pass
            except ConnectionResetError:
                pass


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server and of its clients."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("engine", ["own", "grpcio"])
async def test_a_face_listens_on_a_unix_socket_too(engine: Any, tmp_path: Path) -> None:
    """Both ways lead to the same service. What a killed process has left is replaced; nothing is left at the end."""
    path = tmp_path / "predict"
    with socket.socket(socket.AF_UNIX) as left_by_a_killed_process:
        left_by_a_killed_process.bind(str(path))
    config = GrpcConfig(stage="test", metadata=METADATA, engine=engine, socket_path=str(path))

    async with GrpcFace(FakeInference(), config) as face:
        for target in (f"unix:{path}", f"127.0.0.1:{face.port}"):
            async with RemoteInference(target, stage="test") as remote:
                for value in (1.0, 2.0):
                    x = Tensor("x", "FP64", (1,), struct.pack("<d", value))
                    assert (await remote.infer(InferRequest("m", (x,)))).outputs == (x,)

    assert not path.exists()


def test_the_socket_of_a_running_process_is_not_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "predict")
    with listen_unix(path), pytest.raises(SystemExit, match=f"cannot listen on {path}: Address already in use"):
        listen_unix(path)
    assert Path(path).exists()


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")

    with pytest.raises(SystemExit, match="Address already in use"):
        listen_unix(str(path))

    assert path.read_text() == "mine"
