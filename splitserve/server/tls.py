"""Server-side TLS of both faces: certificates are reloaded when their files change.

New handshakes use the current files; open connections stay as they are.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from splitserve.tls import check_certificates, check_key
from splitserve.watched import Watched

if TYPE_CHECKING:
    import grpc


class ServerTls(msgspec.Struct, frozen=True):
    """PEM files of a server. With ``client_ca_file``, clients must present a certificate that one of its authorities signed."""

    cert_file: str
    key_file: str
    client_ca_file: str = ""

    @property
    def files(self) -> list[str]:
        """The files that are set."""
        return [path for path in (self.cert_file, self.key_file, self.client_ca_file) if path]

    def check(self) -> None:
        """Raises:
        OSError: a file cannot be read.
        ValueError: it is not what it should be.
        """
        check_key(self.cert_file, self.key_file)
        if self.client_ca_file:
            check_certificates(self.client_ca_file)

    def ssl_context(self, protocol: str) -> ssl.SSLContext:
        """A context from the files, for one ALPN protocol. Raises as `check`."""
        self.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols([protocol])
        context.load_cert_chain(self.cert_file, self.key_file)
        if self.client_ca_file:
            context.load_verify_locations(cafile=self.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
            context.num_tickets = 0  # a resumed session would not check the certificate against the current authorities
        return context


def following_ssl_context(tls: ServerTls, protocol: str) -> ssl.SSLContext:
    """A context for an asyncio server that checks at every handshake whether the files have changed.

    Args:
        tls: the files.
        protocol: the ALPN name.
    """
    files = Watched(tls.files, lambda: tls.ssl_context(protocol))
    front = files.value

    def choose(connection: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
        files.has_changed()
        if files.value is not front:
            connection.context = files.value

    front.sni_callback = choose  # called for every client, with or without SNI
    return front


def following_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """The same for grpcio's server."""
    import grpc  # where our own server is used, nothing else here needs it

    def read() -> grpc.ServerCertificateConfiguration:
        tls.check()
        pair = Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()
        return grpc.ssl_server_certificate_configuration(
            [pair], Path(tls.client_ca_file).read_bytes() if tls.client_ca_file else None
        )

    files = Watched(tls.files, read)

    def current() -> grpc.ServerCertificateConfiguration:
        files.has_changed()
        return files.value

    return grpc.dynamic_ssl_server_credentials(files.value, current, require_client_authentication=bool(tls.client_ca_file))
