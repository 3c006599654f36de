"""TLS as callers need it: which files, whether they can be used, and channels that follow them as they change.

A server's side is in `splitserve.server.tls`.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec

from splitserve.watched import Watched

LOOK_INTERVAL_S = 1.0
"""Least time between two looks at a channel's files."""

CLOSE_GRACE_S = 60.0
"""How long calls on a channel with old certificates may go on."""

Options = Sequence[tuple[str, Any]]


class ClientTls(msgspec.Struct, frozen=True):
    """Files for calls over TLS, all PEM.

    ``ca_file`` holds the authorities that may have signed the server's certificate; ``cert_file`` and ``key_file`` are shown to
    servers that ask for a certificate. ``server_name`` is the name that the server's certificate must have, where that is not the
    host of the address.
    """

    ca_file: str
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

    @property
    def files(self) -> list[str]:
        """Those that are given."""
        return [path for path in (self.ca_file, self.cert_file, self.key_file) if path]

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises:
        OSError: a file can not be read.
        ValueError: it is not what it should be.
        """
        check_certificates(self.ca_file)
        if not self.cert_file:
            return grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())
        check_key(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(
            Path(self.ca_file).read_bytes(), Path(self.key_file).read_bytes(), Path(self.cert_file).read_bytes()
        )

    def options(self) -> Options:
        """What a channel needs besides the credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def check_certificates(path: str) -> None:
    """Raises:
    OSError: the file can not be read.
    ValueError: it holds no certificates in PEM form.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ValueError(f"{path} holds no certificate in PEM form") from None


def check_key(cert_file: str, key_file: str) -> None:
    """Raises:
    OSError: a file can not be read.
    ValueError: the key is not that of the certificate, is no PEM key, or has a passphrase.
    """
    check_certificates(cert_file)
    try:
        # The password keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except ssl.SSLError:
        raise ValueError(f"{key_file} is not the key of {cert_file}, or no PEM key without a passphrase") from None


def from_environment() -> ClientTls | None:
    """What commands and probes call with; None without SPLITSERVE_CA_FILE."""
    ca_file, cert_file, key_file, server_name = (
        os.environ.get(f"SPLITSERVE_{name}", "") for name in ("CA_FILE", "CERT_FILE", "KEY_FILE", "SERVER_NAME")
    )
    return ClientTls(ca_file, cert_file, key_file, server_name) if ca_file else None


def token_from_environment() -> str:
    """The token that commands show: the text of SPLITSERVE_TOKEN_FILE, or none."""
    path = os.environ.get("SPLITSERVE_TOKEN_FILE")
    return Path(path).read_text(encoding="ascii").strip() if path else ""


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a token; none for none."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def open_channel(target: str, options: Options, tls: ClientTls | None = None, token: str = "") -> Any:
    """A channel to ``target``: in plain text, or over TLS with files that may change while it is open.

    Args:
        target: gRPC name.
        options: of the channel.
        tls: None: plain text.
        token: shown with every call.

    Raises:
        OSError, ValueError: files of ``tls`` can not be used.
    """
    if tls is None and not token:
        return grpc.aio.insecure_channel(target, options=options)
    return Channel(target, options, tls, token)


class Channel:
    """As much of ``grpc.aio.Channel`` as is used here, that shows a token and renews itself when its TLS files change.

    Credentials of a gRPC channel are fixed for its life, so a new one is opened for new files: calls begin on the new one, those
    under way end on the old one.
    """

    def __init__(self, target: str, options: Options, tls: ClientTls | None, token: str) -> None:
        self._target = target
        self._options = [*options, *(tls.options() if tls else ())]
        self._metadata = bearer(token)
        self._files = Watched(tls.files, tls.credentials) if tls else None
        self._channel = self._open()
        self._next_look = time.monotonic() + LOOK_INTERVAL_S
        self._closing: set[asyncio.Task[None]] = set()

    def unary_unary(self, method: str, **serializers: Any) -> Callable[..., Any]:
        """As of the channel that is current when it is called."""
        return self._calling("unary_unary", method, serializers)

    def unary_stream(self, method: str, **serializers: Any) -> Callable[..., Any]:
        """Likewise."""
        return self._calling("unary_stream", method, serializers)

    def stream_stream(self, method: str, **serializers: Any) -> Callable[..., Any]:
        """Likewise."""
        return self._calling("stream_stream", method, serializers)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Likewise."""
        return self._current().get_state(try_to_connect)

    async def close(self, grace: float | None = None) -> None:
        """Close what is open."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(grace)

    def _calling(self, kind: str, method: str, serializers: dict[str, Any]) -> Callable[..., Any]:
        def call(*arguments: Any, metadata: Sequence[tuple[str, str]] = (), **options: Any) -> Any:
            callable_ = getattr(self._current(), kind)(method, **serializers)
            return callable_(*arguments, metadata=(*metadata, *self._metadata), **options)

        return call

    def _current(self) -> grpc.aio.Channel:
        now = time.monotonic()
        if self._files and now >= self._next_look:
            self._next_look = now + LOOK_INTERVAL_S
            if self._files.has_changed():
                closing = asyncio.create_task(self._channel.close(CLOSE_GRACE_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                self._channel = self._open()
        return self._channel

    def _open(self) -> grpc.aio.Channel:
        if self._files is None:
            return grpc.aio.insecure_channel(self._target, options=self._options)
        return grpc.aio.secure_channel(self._target, self._files.value, options=self._options)
