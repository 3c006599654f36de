"""TLS as servers need it: credentials of both faces, which follow their files as they change.

New handshakes use what the files say now; connections that are open stay as they are.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import msgspec

from splitserve.tls import check_certificates, check_key
from splitserve.watched import Watched

HANDSHAKE_TIMEOUT_S = 10.0


class ServerTls(msgspec.Struct, frozen=True):
    """Files of a server, all PEM. With ``client_ca_file``, callers must show a certificate that one of its authorities signed."""

    cert_file: str
    key_file: str
    client_ca_file: str = ""

    @property
    def files(self) -> list[str]:
        """Those that are given."""
        return [path for path in (self.cert_file, self.key_file, self.client_ca_file) if path]

    def check(self) -> None:
        """Raises:
        OSError: a file can not be read.
        ValueError: it is not what it should be.
        """
        check_key(self.cert_file, self.key_file)
        if self.client_ca_file:
            check_certificates(self.client_ca_file)

    def grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        """What the files say, for a gRPC server. Raises as `check`."""
        self.check()
        pair = (Path(self.key_file).read_bytes(), Path(self.cert_file).read_bytes())
        roots = Path(self.client_ca_file).read_bytes() if self.client_ca_file else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def ssl_context(self) -> ssl.SSLContext:
        """What the files say, for `ssl`. Raises as `check`."""
        self.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.cert_file, self.key_file)
        if self.client_ca_file:
            context.load_verify_locations(cafile=self.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
            context.num_tickets = 0  # who resumes a session shows no certificate, be its authority still trusted or not
        return context


def grpc_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials of a gRPC server. The files are looked at with every handshake."""
    files = Watched(tls.files, tls.grpc_configuration)

    def fetch() -> grpc.ServerCertificateConfiguration:
        files.has_changed()
        return files.value

    return grpc.dynamic_ssl_server_credentials(files.value, fetch, bool(tls.client_ca_file))


def following_ssl_context(tls: ServerTls) -> ssl.SSLContext:
    """A context for an asyncio server. The files are looked at with every handshake."""
    files = Watched(tls.files, tls.ssl_context)
    front = files.value

    def choose(connection: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
        files.has_changed()
        if files.value is not front:
            connection.context = files.value

    front.sni_callback = choose  # called for every client, whether it names a server or not
    return front


def add_port(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> int:
    """Have the server listen there, in plain text without ``tls``; gives the port."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, grpc_credentials(tls))
