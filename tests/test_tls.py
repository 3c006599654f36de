"""TLS on both faces and on the channels between services: who is accepted, and files that change."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.cli.connection import client as command_client
from splitserve.cli.connection import connect
from splitserve.client import TLS, Client
from splitserve.errors import Unavailable
from splitserve.oip.messages import InferRequest, InferResponse, ServerMetadata, deadline_after
from splitserve.remote.inference import RemoteInference
from splitserve.server import probe, settings
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_face import GrpcFace
from splitserve.server.tls import ServerTls
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, serving, signature
from splitserve.tls import ClientTls
from tests.certificates import Files, replace, write

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1")
X = Tensor("x", "FP32", (1, 2), bytes(8))


on_both_engines = pytest.mark.usefixtures("engine")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def unknown_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return write(tmp_path / "ours", authority)


@pytest.fixture
def foreign(tmp_path: Path, unknown_authority: trustme.CA) -> Files:
    return write(tmp_path / "foreign", unknown_authority)


@asynccontextmanager
async def rest(server: ServerTls) -> AsyncIterator[str]:
    service = ProxyService(FakeInference(ECHO))
    await service.refresh()
    app = RestApp(
        service,
        RestConfig(metadata=ServerMetadata("test", "0"), max_body_bytes=1000, default_timeout_s=10, grace_s=1, tls=server),
    )
    async with RestFace(app) as face:
        yield f"https://127.0.0.1:{face.port}"


async def get(url: str, caller: ClientTls | None, **context: Any) -> int:
    """Status of a question over a new connection."""
    verify = ssl.create_default_context(cafile=caller.ca_file) if caller else ssl.create_default_context()
    for name, value in context.items():
        setattr(verify, name, value)
    if caller and caller.cert_file:
        verify.load_cert_chain(caller.cert_file, caller.key_file)
    async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
        return (await client.get(f"{url}/v2/health/live")).status_code


REFUSED_AFTER_S = 0.2
"""A handshake that is going to succeed takes a tenth of it."""


async def infer(address: str, caller: ClientTls | None, **options: Any) -> InferResponse:
    """An answer over a new channel."""
    async with RemoteInference(address, stage="predict", tls=caller, **options) as remote:
        return await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(5)))


@on_both_engines
async def test_calls_cross_a_hop_over_tls(files: Files) -> None:
    """A caller that trusts the server's authority is answered; with mutual TLS, if it has a certificate."""
    async with serving(FakeInference(ECHO), tls=files.server) as address:
        assert (await infer(address, files.trusting)).outputs == (X,)
    async with serving(FakeInference(ECHO), tls=files.mutual) as address:
        assert (await infer(address, files.client)).outputs == (X,)


@on_both_engines
@pytest.mark.parametrize(
    "case", ["plain text", "no certificate", "certificate of an unknown authority", "server of an unknown authority"]
)
async def test_an_untrusted_grpc_caller_is_refused(files: Files, foreign: Files, case: str) -> None:
    """Every way in but the right one ends in the handshake, and nothing reaches the service."""
    callers = {
        "plain text": None,
        "no certificate": files.trusting,
        "certificate of an unknown authority": ClientTls(files.ca, foreign.cert, foreign.key),
        "server of an unknown authority": ClientTls(foreign.ca, files.cert, files.key),
    }
    service = FakeInference(ECHO)

    async with serving(service, tls=files.mutual) as address:
        with pytest.raises(Unavailable):
            await infer(address, callers[case], wait_s=REFUSED_AFTER_S)

    assert service.requests == []


@pytest.mark.parametrize(
    "case", ["no certificate", "certificate of an unknown authority", "server of an unknown authority", "old TLS"]
)
async def test_an_untrusted_rest_caller_is_refused(files: Files, foreign: Files, case: str) -> None:
    """As over gRPC."""
    callers = {
        "no certificate": files.trusting,
        "certificate of an unknown authority": ClientTls(files.ca, foreign.cert, foreign.key),
        "server of an unknown authority": ClientTls(foreign.ca, files.cert, files.key),
        "old TLS": files.client,
    }
    limits: dict[str, Any] = {"maximum_version": ssl.TLSVersion.TLSv1_1, "minimum_version": ssl.TLSVersion.TLSv1}
    async with rest(files.mutual) as url:
        with warnings.catch_warnings(), pytest.raises(httpx.TransportError):
            warnings.simplefilter("ignore", DeprecationWarning)  # ours for asking for an old TLS
            await get(url, callers[case], **(limits if case == "old TLS" else {}))

        assert await get(url, files.client) == 200


async def test_plain_text_to_a_tls_port_is_closed(files: Files) -> None:
    """HTTP on the https port gets no answer in plain text."""
    async with rest(files.server) as url, httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(url.replace("https", "http"))


async def test_new_files_serve_new_handshakes_over_rest(tmp_path: Path, files: Files, unknown_authority: trustme.CA) -> None:
    """Certificate, key and client authority are exchanged while the server runs; the old ones are then of no use."""
    async with rest(files.mutual) as url:
        old = copy(files, tmp_path / "old")
        assert await get(url, files.client) == 200

        new = write(Path(files.ca).parent, unknown_authority)

        assert await get(url, new.client) == 200
        for caller in (ClientTls(old.ca, new.cert, new.key), ClientTls(new.ca, old.cert, old.key)):
            with pytest.raises(httpx.TransportError):
                await get(url, caller)


@on_both_engines
async def test_new_files_serve_new_handshakes_over_grpc(tmp_path: Path, files: Files, unknown_authority: trustme.CA) -> None:
    """As over REST."""
    async with serving(FakeInference(ECHO), tls=files.mutual) as address:
        old = copy(files, tmp_path / "old")
        await infer(address, files.client)

        new = write(Path(files.ca).parent, unknown_authority)

        await infer(address, new.client)
        for caller in (ClientTls(old.ca, new.cert, new.key), ClientTls(new.ca, old.cert, old.key)):
            with pytest.raises(Unavailable):
                await infer(address, caller, wait_s=REFUSED_AFTER_S)


async def test_mismatched_certificate_files_are_not_used(tmp_path: Path, files: Files, foreign: Files) -> None:
    """A certificate that came before its key leaves the server with what it had."""
    async with serving(FakeInference(ECHO), tls=files.mutual) as address, rest(files.mutual) as url:
        caller = copy(files, tmp_path / "caller").client

        write_over(files.cert, foreign.cert)

        assert (await infer(address, caller)).outputs == (X,)
        assert await get(url, caller) == 200


@on_both_engines
async def test_certificates_are_renewed_under_load_without_a_failed_call(
    files: Files, unknown_authority: trustme.CA, authority: trustme.CA
) -> None:
    """First both authorities are trusted, then certificates are of the new one, then only it is trusted; every call is answered,
    those included that are under way while the channel is renewed."""
    both = authority.cert_pem.bytes() + unknown_authority.cert_pem.bytes()
    count = 0
    async with (
        serving(FakeInference(ECHO), tls=files.mutual) as address,
        RemoteInference(address, stage="predict", tls=files.client, resolve_interval_s=0.05) as remote,
    ):

        async def calls() -> None:
            nonlocal count
            await asyncio.gather(*(remote.infer(InferRequest("echo", (X,), deadline=deadline_after(20))) for _ in range(20)))
            count += 20

        await calls()
        replace(files.ca, both)
        await calls()
        under_way = asyncio.create_task(calls())
        write(Path(files.ca).parent, unknown_authority)
        replace(files.ca, both)
        await under_way
        await calls()
        replace(files.ca, unknown_authority.cert_pem.bytes())
        await calls()
        assert (await infer(address, files.client)).outputs == (X,)

    assert count == 100


async def test_a_channel_presents_its_new_certificate(tmp_path: Path, files: Files, unknown_authority: trustme.CA) -> None:
    """A caller whose files change is let in by a server that takes the new ones only."""
    new = write(tmp_path / "new", unknown_authority)
    caller = write(tmp_path / "caller", trustme.CA())
    async with (
        serving(FakeInference(ECHO), tls=new.mutual) as address,
        RemoteInference(address, stage="predict", tls=caller.client, resolve_interval_s=0.05) as remote,
    ):
        with pytest.raises(Unavailable):
            await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(5)))

        write(tmp_path / "caller", unknown_authority)

        assert (await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(5)))).outputs == (X,)


async def test_a_stream_is_reopened_while_the_files_are_invalid(files: Files) -> None:
    """The previous content applies until the files are valid again, for a stream as for a channel."""
    metadata = ServerMetadata("test", "0")
    config = GrpcConfig(stage="predict", metadata=metadata, max_message_bytes=10_000, tls=files.mutual)
    face = GrpcFace(FakeInference(ECHO), config)
    async with face, RemoteInference(f"127.0.0.1:{face.port}", stage="predict", tls=files.client) as remote, asyncio.timeout(30):
        while remote.n_streams != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        before = set(face._server.connections)
        replace(files.client.ca_file, b"no certificate")

        for connection in before:
            connection.drain()
        while before & set(face._server.connections) or remote.n_streams != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

        assert (await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(20)))).outputs == (X,)


async def test_the_server_name_may_differ_from_the_address(tmp_path: Path, authority: trustme.CA) -> None:
    """A certificate that has only the service's name is accepted if the server name is configured."""
    named = write(tmp_path / "named", authority, names=("predict",))
    async with serving(FakeInference(ECHO), tls=named.server) as address:
        with pytest.raises(Unavailable):
            await infer(address, ClientTls(named.ca), wait_s=REFUSED_AFTER_S)
        assert (await infer(address, ClientTls(named.ca, server_name="predict"))).outputs == (X,)


async def test_commands_probe_and_client_find_their_files(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    """The environment names them for commands and probes; the client takes them as an argument."""
    async with serving(FakeInference(ECHO), tls=files.mutual) as address:

        def client_call() -> bool:
            with Client(address, tls=TLS(ca_file=files.ca, cert_file=files.cert, key_file=files.key)) as client:
                return client.is_ready()

        plain = await asyncio.to_thread(probe.problem, address, probe.READY)
        for name, path in (("CA", files.ca), ("CERT", files.cert), ("KEY", files.key)):
            monkeypatch.setenv(f"SPLITSERVE_{name}_FILE", path)

        assert plain.startswith("UNAVAILABLE")
        async with connect(address) as remote:
            assert [state.name for state in await remote.index()] == ["echo"]
        assert await asyncio.to_thread(client_call)
        with closing(command_client(address, timeout_s=10)) as client:
            assert await asyncio.to_thread(client.is_ready)
        assert "NOT" not in await asyncio.to_thread(probe.problem, address, probe.ACCEPTS_CALLS)


def test_commands_refuse_invalid_tls_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that names the variables, and status 2."""
    monkeypatch.setenv("SPLITSERVE_CA_FILE", "/nowhere.pem")

    for command in (connect, lambda url: command_client(url, timeout_s=1)):
        with pytest.raises(SystemExit) as raised:
            command("127.0.0.1:1")

        assert raised.value.code == 2
        assert capsys.readouterr().err.startswith("SPLITSERVE_CA_FILE")


@pytest.mark.parametrize(("url", "message"), [("http://", "expected a host"), ("http://127.0.0.1:1", "is plain text, but tls")])
def test_a_command_refuses_an_invalid_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Files, url: str, message: str
) -> None:
    """A token must not be sent in plain text because of a mistyped scheme."""
    monkeypatch.setenv("SPLITSERVE_CA_FILE", files.ca)

    with pytest.raises(SystemExit) as raised:
        command_client(url, timeout_s=1)

    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_name_the_tls_files(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    """Of the listeners and of the channel to the next service."""
    for name, path in (("TLS_CERT", files.cert), ("TLS_KEY", files.key), ("TLS_CLIENT_CA", files.ca), ("NEXT_CA", files.ca)):
        monkeypatch.setenv(f"PROXY_{name}_FILE", path)

    config = settings.read(ProxySettings)

    assert (config.tls, config.next_tls) == (files.mutual, files.trusting)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"TLS_CERT_FILE": "cert"}, "TLS_KEY_FILE"),
        ({"TLS_KEY_FILE": "key"}, "TLS_KEY_FILE"),
        ({"TLS_CERT_FILE": "nowhere", "TLS_KEY_FILE": "key"}, "TLS_CERT_FILE"),
        ({"TLS_CERT_FILE": "key", "TLS_KEY_FILE": "key"}, "TLS_CERT_FILE"),
        ({"TLS_CERT_FILE": "cert", "TLS_KEY_FILE": "foreign"}, "TLS_KEY_FILE"),
        ({"TLS_CERT_FILE": "cert", "TLS_KEY_FILE": "cert"}, "TLS_KEY_FILE"),
        ({"TLS_CERT_FILE": "cert", "TLS_KEY_FILE": "locked"}, "TLS_KEY_FILE"),
        ({"TLS_CLIENT_CA_FILE": "ca"}, "TLS_CLIENT_CA_FILE"),
        ({"TLS_CERT_FILE": "cert", "TLS_KEY_FILE": "key", "TLS_CLIENT_CA_FILE": "empty"}, "TLS_CLIENT_CA_FILE"),
        ({"NEXT_CERT_FILE": "cert", "NEXT_KEY_FILE": "key"}, "NEXT_CERT_FILE"),
        ({"NEXT_CA_FILE": "ca", "NEXT_CERT_FILE": "cert"}, "NEXT_KEY_FILE"),
        ({"NEXT_SERVER_NAME": "preprocess"}, "NEXT_SERVER_NAME"),
        ({"NEXT_CA_FILE": "nowhere"}, "NEXT_CA_FILE"),
    ],
)
def test_invalid_tls_files_stop_the_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    files: Files,
    foreign: Files,
    given: dict[str, str],
    named: str,
) -> None:
    """Before anything is bound, with a line that names the setting and without a prompt for a passphrase."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "locked").write_bytes(locked_key(files))
    paths = {"cert": files.cert, "key": files.key, "ca": files.ca, "foreign": foreign.key, "preprocess": "preprocess"}
    for name, what in given.items():
        monkeypatch.setenv(f"PROXY_{name}", paths.get(what, str(tmp_path / what)))

    with pytest.raises(SystemExit) as raised:
        settings.read(ProxySettings)

    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"PROXY_{named}: ")


def locked_key(files: Files) -> bytes:
    """The key of the certificate with a passphrase."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(files.key).read_bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def write_over(path: str, other: str) -> None:
    """Put the other file's content into the file."""
    replace(path, Path(other).read_bytes())


def copy(files: Files, folder: Path) -> Files:
    """The same files elsewhere."""
    folder.mkdir()
    for path in files:
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    return Files(*(str(folder / Path(path).name) for path in files))
