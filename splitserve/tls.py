"""TLS of clients: certificate files, credentials, tokens. The server side is `splitserve.server.tls`."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec

Options = Sequence[tuple[str, Any]]


class ClientTls(msgspec.Struct, frozen=True):
    """Paths to PEM files for calls over TLS.

    ``ca_file`` holds the authorities that the server's certificate is verified against; ``cert_file`` and ``key_file`` are the
    client's own, for servers that require one. ``server_name`` is the name expected in the server's certificate, if it is not
    the host of the address.
    """

    ca_file: str
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

    @property
    def files(self) -> list[str]:
        """The paths that are set."""
        return [path for path in (self.ca_file, self.cert_file, self.key_file) if path]

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises:
        OSError: a file cannot be read.
        ValueError: a file is not valid PEM, or the key does not match the certificate.
        """
        check_certificates(self.ca_file)
        if not self.cert_file:
            return grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())
        check_key(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(
            Path(self.ca_file).read_bytes(), Path(self.key_file).read_bytes(), Path(self.cert_file).read_bytes()
        )

    def ssl_context(self) -> ssl.SSLContext:
        """The same for HTTP/2 connections of our own. Raises as `credentials`."""
        check_certificates(self.ca_file)
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        if self.cert_file:
            check_key(self.cert_file, self.key_file)
            context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def options(self) -> Options:
        """Channel options besides the credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def check_certificates(path: str) -> None:
    """Raises:
    OSError: the file cannot be read.
    ValueError: it contains no PEM certificate.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ValueError(f"{path}: expected a PEM certificate") from None


def check_key(cert_file: str, key_file: str) -> None:
    """Raises:
    OSError: a file cannot be read.
    ValueError: the key does not match the certificate, is not PEM, or has a passphrase.
    """
    check_certificates(cert_file)
    try:
        # The password keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except ssl.SSLError:
        raise ValueError(f"{key_file}: expected the key of {cert_file}, PEM without a passphrase") from None


def from_environment() -> ClientTls | None:
    """TLS of commands and probes, from SPLITSERVE_CA_FILE and others; None without it."""
    ca_file, cert_file, key_file, server_name = (
        os.environ.get(f"SPLITSERVE_{name}", "") for name in ("CA_FILE", "CERT_FILE", "KEY_FILE", "SERVER_NAME")
    )
    return ClientTls(ca_file, cert_file, key_file, server_name) if ca_file else None


def token_from_environment() -> str:
    """The token of commands: the content of SPLITSERVE_TOKEN_FILE, or ""."""
    path = os.environ.get("SPLITSERVE_TOKEN_FILE")
    return Path(path).read_text(encoding="ascii").strip() if path else ""


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The call metadata with a bearer token; () for ""."""
    return (("authorization", f"Bearer {token}"),) if token else ()
