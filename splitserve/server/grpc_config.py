"""What a gRPC face is configured with."""

from __future__ import annotations

from typing import Literal

import msgspec

from splitserve.oip.limits import MAX_MESSAGE_BYTES, RequestLimits
from splitserve.oip.messages import NO_DEADLINE, ServerMetadata
from splitserve.server.tls import ServerTls
from splitserve.wire.grpc.server import ServerLimits

Engine = Literal["own", "grpcio"]

_INT_MAX = 2**31 - 1


class GrpcConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a gRPC face. Settings classes build it; the defaults are those of tests."""

    stage: str
    """The name that errors carry, e.g. ``"predict"``."""

    metadata: ServerMetadata
    """The answer to ServerMetadata."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: a free one, see `GrpcFace.port`."""

    socket_path: str = ""
    """Of a unix socket that it listens on as well; "": none."""

    shares_port: bool = False
    """Whether other processes of the service listen on the same port."""

    tls: ServerTls | None = None
    """None: plain text."""

    engine: Engine = "own"
    """The gRPC server: our own, or grpcio's."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message received or sent."""

    default_timeout_s: float = 0.0
    """Deadline of calls that have none; 0: none."""

    max_timeout_s: float = NO_DEADLINE
    """Longest deadline that a call may have."""

    retry_after_s: float = 0.0
    """At the proxy: the push-back sent to clients. 0 between services: a caller may try another replica at once, except for
    errors of a later stage, which were retried there."""

    allow_control: bool = False
    """Accept requests to load and unload models."""

    request_limits: RequestLimits = RequestLimits()
    connection_limits: ServerLimits = ServerLimits()
    """``max_message_bytes`` above replaces its own."""

    drain_delay_s: float = 0.0
    """How long to keep serving while reporting "not ready", once `GrpcFace.drain` is called."""

    grace_s: float = 30.0
    """How long calls in flight may take to finish after that."""

    @property
    def grpcio_options(self) -> list[tuple[str, int]]:
        """The limits as channel arguments of grpcio. Source: grpc-core, channel_arg_names.h."""
        limits = self.connection_limits
        times = ("keepalive_time", "keepalive_timeout", "max_connection_age", "max_connection_age_grace", "max_connection_idle")
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", limits.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
            ("grpc.max_concurrent_streams", limits.max_streams),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", int(self.shares_port)),
            *((f"grpc.{name}_ms", round(min(getattr(limits, f"{name}_s") * 1000, _INT_MAX))) for name in times),
        ]
