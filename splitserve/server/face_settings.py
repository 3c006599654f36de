"""Settings of a service's gRPC face, which every service has, and the configuration built from them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from splitserve import __version__
from splitserve.oip import messages
from splitserve.oip.messages import ServerMetadata
from splitserve.server.grpc_config import Engine, GrpcConfig
from splitserve.server.limit_settings import LimitSettings
from splitserve.server.settings import ServiceSettings
from splitserve.server.tls_settings import ListenerTlsSettings
from splitserve.wire.listening import check_socket_path


class FaceSettings(ListenerTlsSettings, LimitSettings, ServiceSettings):
    """Settings of every service with a gRPC face."""

    stage: ClassVar[str]
    """The service's name, in errors and in its metadata."""

    grpc_port: int = Field(ge=0, le=65535)
    """Port of the gRPC face."""

    grpc_socket: Annotated[str, AfterValidator(check_socket_path)] = ""
    """Path of a unix socket that the gRPC face listens on as well: callers on this host reach it by the target `unix:PATH`, which
    costs less than TCP. Not with several workers. Empty: none."""

    grpc_engine: Engine | Literal[""] = ""
    """The gRPC server of this service, own or grpcio; that of `GRPC_ENGINE` when empty."""

    grpc_engine_of_all: Engine = Field("own", validation_alias=AliasChoices("GRPC_ENGINE"))
    """The gRPC server of all services: own, or grpcio for a peer that is not compatible with our own (docs/interoperation.md)."""

    @model_validator(mode="after")
    def _check_grpc_socket(self) -> FaceSettings:
        if self.grpc_socket and self.workers > 1:
            raise ValueError(f"grpc_socket: several workers cannot share a unix socket; got {self.workers} workers")
        return self

    @property
    def server_metadata(self) -> ServerMetadata:
        """The answer to ServerMetadata."""
        extensions = messages.extensions(allow_control=self.allow_repository_control)
        return ServerMetadata(f"splitserve-{self.stage}", __version__, extensions)

    @property
    def grpc_config(self) -> GrpcConfig:
        """Configuration of the gRPC face."""
        return GrpcConfig(
            stage=self.stage,
            metadata=self.server_metadata,
            host=self.host,
            port=self.grpc_port,
            socket_path=self.grpc_socket,
            shares_port=self.shares_ports,
            tls=self.tls,
            engine=self.grpc_engine or self.grpc_engine_of_all,
            max_message_bytes=self.max_message_bytes,
            allow_control=self.allow_repository_control,
            request_limits=self.limits,
            connection_limits=self.grpc_limits,
            drain_delay_s=self.drain_delay_s,
            grace_s=self.grace_s,
        )
