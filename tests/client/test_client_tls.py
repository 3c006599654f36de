"""Certificates, the server's and the client's, over both transports."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import trustme

from splitserve.api.inference import inference_pb2 as pb
from splitserve.client import TLS
from splitserve.errors import Unavailable
from splitserve.oip.protobuf import SERVICE
from tests.client.scripted import http, scripted
from tests.client.ways import Way


class Authority(NamedTuple):
    """A certificate authority, and what it signed: for the server at 127.0.0.1 and for a client."""

    ca: trustme.CA
    server: trustme.LeafCert
    folder: Path

    @property
    def tls(self) -> TLS:
        return TLS(ca_file=self.folder / "ca.pem")

    @property
    def tls_with_client(self) -> TLS:
        return TLS(ca_file=self.folder / "ca.pem", cert_file=self.folder / "client.pem", key_file=self.folder / "client.key")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    client = ca.issue_cert("client@example.org")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    client.private_key_pem.write_to_path(str(folder / "client.key"))
    client.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))
    return Authority(ca, ca.issue_cert("127.0.0.1"), folder)


@asynccontextmanager
async def serving(authority: Authority, way: Way, *, asks_clients: bool) -> AsyncIterator[str]:
    """A server that is live, over TLS."""
    if way.is_rest:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.server.configure_cert(context)
        if asks_clients:
            authority.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        async with scripted(http(200, {"live": True}), context=context) as server:
            yield server.url
        return
    server = grpc.aio.server()

    async def live(request: bytes, context: Any) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    handlers = {"ServerLive": grpc.unary_unary_rpc_method_handler(live)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    key, chain = authority.server.private_key_pem.bytes(), authority.server.cert_chain_pems[0].bytes()
    root = authority.ca.cert_pem.bytes() if asks_clients else None
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)], root, asks_clients))
    await server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_trusted_server_is_called(way: Way, authority: Authority) -> None:
    """Its certificate is signed by the authority that was given."""
    async with serving(authority, way, asks_clients=False) as url, way.at(url, tls=authority.tls, token="secret") as client:
        assert await client.is_live()


async def test_a_server_that_is_not_trusted_is_unavailable_at_once(way: Way, authority: Authority) -> None:
    """A retry cannot help."""
    async with serving(authority, way, asks_clients=False) as url, way.at(url) as client:
        with pytest.raises(Unavailable, match="certificate"):
            await client.is_live()


async def test_a_client_presents_its_certificate(way: Way, authority: Authority) -> None:
    """To a server that asks for one."""
    async with serving(authority, way, asks_clients=True) as url, way.at(url, tls=authority.tls_with_client) as client:
        assert await client.is_live()


async def test_a_client_without_a_certificate_is_refused(way: Way, authority: Authority) -> None:
    """By a server that asks for one."""
    async with serving(authority, way, asks_clients=True) as url, way.at(url, tls=authority.tls, max_attempts=1) as client:
        with pytest.raises(Unavailable):
            await client.is_live()
