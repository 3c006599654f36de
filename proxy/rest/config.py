"""What the REST face is configured with."""

from __future__ import annotations

import math

import msgspec

from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import ServerMetadata
from splitserve.server.tls import ServerTls
from splitserve.wire.http1.listener import HttpLimits


class RestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of the REST face. `ProxySettings` builds it; the defaults are those of tests."""

    metadata: ServerMetadata
    """The answer to ``GET /v2``."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: a free one, see `RestFace.port`."""

    shares_port: bool = False
    """Whether other processes of the service listen on the same port."""

    tls: ServerTls | None = None
    """None: plain text."""

    max_body_bytes: int = 64 * 1024 * 1024
    """Largest body accepted, compressed or not."""

    default_timeout_s: float = 30.0
    """Deadline of requests that set none."""

    max_timeout_s: float = math.inf
    """Longest deadline that a request may set."""

    retry_after_s: int = 1
    """The ``Retry-After`` sent to clients, in seconds."""

    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call; "*": any."""

    allow_control: bool = False
    """Accept requests to load and unload models."""

    request_limits: RequestLimits = RequestLimits()
    connection_limits: HttpLimits = HttpLimits()

    drain_delay_s: float = 0.0
    """How long to keep serving while reporting "not ready", once `RestFace.drain` is called."""

    grace_s: float = 30.0
    """How long requests in flight may take to finish after that."""
