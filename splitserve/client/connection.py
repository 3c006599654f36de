"""The options of a client's connection: address, certificates, token, compression. Knows no gRPC and no HTTP."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from splitserve import __version__
from splitserve.errors import InvalidInput, Unauthenticated

Compression = Literal["gzip"] | None

Token = str | Callable[[], str] | None
"""A bearer token, or a function that returns one. It is called for every request, so tokens can be renewed."""

AsyncToken = str | Callable[[], str | Awaitable[str]] | None
"""The same; the function may be async."""

Headers = Mapping[str, str] | Callable[[], Mapping[str, str]] | None
"""Headers of every request, or a function that returns them. It is called for every request."""

USER_AGENT = f"splitserve/{__version__}"

_SCHEMES = {"http": (True, False), "https": (True, True), "grpc": (False, False), "grpcs": (False, True)}
_GRPC_SCHEMES = ("dns", "unix", "unix-abstract", "ipv4", "ipv6", "vsock", "xds", "google-c2p")
"""Of names that gRPC resolves. Source: grpc/doc/naming.md."""


class TLS(msgspec.Struct, frozen=True, kw_only=True):
    """Certificates, as paths to PEM files.

    ``ca_file`` holds the authorities that the server's certificate is verified against, in place of the well-known ones;
    ``cert_file`` and ``key_file`` are the client's own, for servers that require one.
    """

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("TLS: expected both cert_file and key_file, got one of them")


class ConnectionOptions(msgspec.Struct, frozen=True):
    """What a transport needs. ``target`` is a URL for REST, a gRPC name for gRPC; ``tls`` None: plain text."""

    target: str
    is_rest: bool
    tls: TLS | None
    compression: Compression
    max_message_bytes: int
    headers: Headers = None
    proxy: str = ""
    http_client: Any = None
    channel: Any = None
    user_agent: str = USER_AGENT

    @property
    def url(self) -> str:
        """For messages."""
        return self.target if self.is_rest or "://" in self.target else f"grpc{'s' if self.tls else ''}://{self.target}"


def connection_options(
    url: str,
    *,
    tls: TLS | None,
    compression: Compression,
    max_message_bytes: int,
    headers: Headers,
    proxy: str | None = None,
    http_client: Any = None,
    channel: Any = None,
) -> ConnectionOptions:
    """Options from a URL and arguments.

    Args:
        url: ``http://…`` or ``https://…`` for REST; ``grpc://…``, ``grpcs://…`` or any name that gRPC knows (``host:port``,
            ``dns:///name:port``, ``unix:path``) for gRPC.
        tls: certificates; a gRPC name without a scheme then means TLS.
        compression: of requests and responses.
        max_message_bytes: the largest message sent or received.
        headers: for every request.
        proxy: URL of an HTTP proxy.
        http_client: the caller's, for REST.
        channel: the caller's, for gRPC.

    Raises:
        ValueError: the URL has no host or, for gRPC, no port, or its scheme is plain text although ``tls`` is given; or an
            option is for the other protocol.
    """
    if compression not in (None, "gzip"):
        raise ValueError(f'compression: expected "gzip" or None, got {compression!r}')
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() in _SCHEMES:  # RFC 3986, 3.1: in any case
        scheme = scheme.lower()
        url = f"{scheme}://{rest}"
    elif separator and scheme not in _GRPC_SCHEMES and channel is None:
        raise ValueError(
            f"{url!r}: expected {', '.join(f'{name}://' for name in _SCHEMES)} or a name that gRPC knows, got the scheme {scheme}"
        )
    known = _SCHEMES.get(scheme) if separator else None
    is_rest, is_secure = known or (False, tls is not None)
    if known and not rest.strip("/"):
        raise ValueError(f"{url!r}: expected a host")
    if tls and not is_secure:
        raise ValueError(f"{url!r} is plain text, but tls is given; use {scheme}s://")
    target = url.rstrip("/") if is_rest else rest.rstrip("/") if known else url
    if not is_rest and not target.rpartition(":")[2].strip("/"):
        raise ValueError(f"{url!r}: expected a host and a port, e.g. {target or 'host'}:8001")
    if known and not is_rest and not target.rpartition(":")[2].isdecimal():
        raise ValueError(f"{url!r}: expected a port, e.g. {scheme}://{target}:8001")
    if http_client is not None and not is_rest:
        raise ValueError(f"http_client is for REST, but {url!r} is gRPC; give a channel, or a URL that begins with http://")
    if channel is not None and is_rest:
        raise ValueError(f"channel is for gRPC, but {url!r} is REST; give an http_client, or a URL that begins with grpc://")
    try:
        fixed = headers if callable(headers) else _lower(headers)
    except InvalidInput as error:
        raise ValueError(error.message) from None
    return ConnectionOptions(
        target,
        is_rest,
        (tls or TLS()) if is_secure else None,
        compression,
        max_message_bytes,
        fixed,
        proxy or "",
        http_client,
        channel,
    )


def request_headers(headers: Headers, token: Token, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers of a request: trace context, the client's, the call's own, credentials. Names in lower case.

    Raises:
        Unauthenticated: the token is not valid in a header.
    """
    return _merged(headers, own) | _authorization(token() if callable(token) else token)


async def request_headers_async(headers: Headers, token: AsyncToken, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """As `request_headers`, for a token that may have to be awaited."""
    value = token() if callable(token) else token
    return _merged(headers, own) | _authorization(await value if inspect.isawaitable(value) else value)


def _merged(headers: Headers, own: Mapping[str, str] | None) -> dict[str, str]:
    merged: dict[str, str] = {}
    if (propagate := sys.modules.get("opentelemetry.propagate")) is not None:
        propagate.inject(merged)
    merged.update(_lower(headers()) if callable(headers) else headers or {})
    if own:
        merged.update(_lower(own))
    return merged


_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
"""Source: RFC 9110, section 5.6.2."""

_RESERVED = frozenset(
    {"content-length", "transfer-encoding", "connection", "keep-alive", "te", "upgrade"}
    | {"grpc-timeout", "grpc-encoding", "grpc-accept-encoding"}
)
"""What says how a request is sent is the transport's."""


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    """With names in lower case.

    Raises:
        InvalidInput: one cannot be sent.
    """
    lower: dict[str, Any] = {}
    given: Mapping[Any, Any] = headers or {}
    for name, value in given.items():
        key = name.lower() if isinstance(name, str) else ""
        if not _NAME.fullmatch(key):
            raise InvalidInput(f'header "{str(name)[:64]}": its name has characters that are not allowed')
        if key in _RESERVED:
            raise InvalidInput(f'header "{key}" is set by the client; timeout_s and compression are arguments')
        if not isinstance(value, str) and not (isinstance(value, bytes) and key.endswith("-bin")):
            raise InvalidInput(f'header "{key}": expected str, got {type(value).__name__}')
        if isinstance(value, str) and any((sign < " " and sign != "\t") or sign == "\x7f" for sign in value):
            raise InvalidInput(f'header "{key}": its value has characters that are not allowed')
        lower[key] = value
    return lower


def _authorization(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    token = token.strip()  # files end in a newline
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise Unauthenticated("the token is empty or has characters that are not allowed in a header")
    return {"authorization": f"Bearer {token}"}
