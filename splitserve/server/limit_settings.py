"""Settings of limits, mixed into each service's settings class."""

from __future__ import annotations

import math

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitserve.oip.limits import RequestLimits
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.server import ServerLimits

KIB = 1024


class LimitSettings(BaseSettings):
    """Limits on requests and connections of any service."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    max_inputs: int = Field(64, gt=0)
    """Maximum number of inputs of a request. A table with one column per input may need more, here and at every service before
    this one."""

    max_outputs: int = Field(64, gt=0)
    """Maximum number of outputs that a request names."""

    max_parameters: int = Field(64, gt=0)
    """Maximum number of parameters of a request, including those of its outputs."""

    max_rows: int = Field(1_048_576, gt=0)
    """Maximum number of rows of an input."""

    max_element_bytes: int = Field(1024 * KIB, gt=0)
    """Maximum size of an element of a BYTES tensor, e.g. a text or an image, in bytes."""

    max_in_flight_bytes: int = Field(512 * KIB * KIB, gt=0)
    """Maximum bytes of requests in flight, over all connections, from arrival to response; more are refused."""

    max_metadata_bytes: int = Field(16 * KIB, gt=0)
    """Maximum size of a gRPC call's metadata, in bytes."""

    max_streams: int = Field(1024, gt=0)
    """Maximum number of concurrent gRPC calls on one connection; clients delay further ones."""

    max_connections: int = Field(2_000, gt=0)
    """Maximum number of connections to a port; more are refused."""

    grpc_keepalive_time_s: float = Field(7200.0, gt=0)
    """Seconds of silence after which a gRPC client is sent a keepalive PING. A value below the idle timeout of a load balancer or
    firewall keeps idle connections through it open."""

    grpc_keepalive_timeout_s: float = Field(20.0, gt=0)
    """Seconds that a gRPC client has to answer that PING; then its connection is closed and its calls are cancelled."""

    grpc_max_connection_age_s: float = Field(0.0, ge=0)
    """Seconds after which a gRPC connection is drained, plus or minus a random tenth, so that its client reconnects and a layer 4
    load balancer can spread it over new replicas. 0: never."""

    grpc_max_connection_age_grace_s: float = Field(0.0, ge=0)
    """Seconds that calls and streams may take to finish once their connection has reached its age; then they end as UNAVAILABLE.
    0: unlimited."""

    grpc_max_connection_idle_s: float = Field(0.0, ge=0)
    """Seconds without a call after which a gRPC connection is drained. 0: never."""

    @property
    def limits(self) -> RequestLimits:
        """Limits on one request."""
        return RequestLimits(self.max_inputs, self.max_outputs, self.max_parameters, self.max_rows, self.max_element_bytes)

    def byte_budget(self) -> ByteBudget:
        """The process-wide limit on bytes in flight, to be made once."""
        return ByteBudget(self.max_in_flight_bytes)

    @property
    def grpc_limits(self) -> ServerLimits:
        """Limits on gRPC connections."""
        return ServerLimits(
            max_metadata_bytes=self.max_metadata_bytes,
            max_streams=self.max_streams,
            max_connections=self.max_connections,
            keepalive_time_s=self.grpc_keepalive_time_s,
            keepalive_timeout_s=self.grpc_keepalive_timeout_s,
            max_connection_age_s=self.grpc_max_connection_age_s or math.inf,
            max_connection_age_grace_s=self.grpc_max_connection_age_grace_s or math.inf,
            max_connection_idle_s=self.grpc_max_connection_idle_s or math.inf,
        )
