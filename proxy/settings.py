"""Settings of the proxy: environment variables that begin with ``PROXY_``."""

from __future__ import annotations

import msgspec
from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from proxy.rest.config import RestConfig
from splitserve.oip.messages import ServerMetadata
from splitserve.server.admin_settings import AdminPort
from splitserve.server.face_settings import FaceSettings
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.settings import BatchingSettings, Target, check_target
from splitserve.server.tls_settings import NextStageTlsSettings
from splitserve.wire.http1.listener import HttpLimits

RETRY_AFTER_S = 1
"""The push-back sent to clients: ``Retry-After`` and ``grpc-retry-pushback-ms``."""


class ProxySettings(NextStageTlsSettings, FaceSettings, BatchingSettings):
    """Settings of the proxy."""

    model_config = SettingsConfigDict(env_prefix="PROXY_")
    stage = "proxy"

    http_port: int = Field(8000, ge=0, le=65535)
    """Port of the REST face."""

    admin_port: AdminPort = 8002
    """Port of the admin listener; 0: any free one; off: none. The fused service has this one only."""

    grpc_port: int = Field(8001, ge=0, le=65535)
    """Port of the gRPC face."""

    preprocess_target: Target = "127.0.0.1:8011"
    """gRPC target of preprocess. `dns:///preprocess:8011` uses every address of the name."""

    jobs_target: str = ""
    """gRPC target of the jobs service, e.g. `127.0.0.1:8031`; over TLS if the next service is (NEXT_CA_FILE). Without one, jobs
    are refused with status 501."""

    default_timeout_s: float = Field(30.0, gt=0)
    """Deadline, in seconds, of requests that set none."""

    max_timeout_s: float = Field(300.0, gt=0)
    """Longest deadline, in seconds, that a request may set."""

    auth_file: str = ""
    """Authorization file: JSON with tokens, JWT issuer and rights (docs/security.md); reloaded when it changes. Without one,
    calls are not authenticated."""

    cors_origins: str = ""
    """Origins of web pages that may call the REST face from a browser, separated by commas, e.g. `https://app.example.com`; `*`
    for any. By default none: browsers keep pages of other origins from reading answers."""

    max_url_bytes: int = Field(8 * 1024, gt=0)
    """Maximum length of a REST request's URL, in bytes."""

    max_header_bytes: int = Field(64 * 1024, gt=0)
    """Maximum size of a REST request's headers, in bytes."""

    max_headers: int = Field(100, gt=0)
    """Maximum number of a REST request's headers."""

    max_chunks: int = Field(65_536, gt=0)
    """Maximum number of chunks of a REST request's body."""

    header_timeout_s: float = Field(10.0, gt=0)
    """Time limit, in seconds, for the headers of a REST request to arrive."""

    min_body_bytes_per_s: int = Field(1_000, ge=0)
    """Minimum rate of a REST body that takes longer than 5 s to arrive."""

    keep_alive_s: float = Field(75.0, gt=0)
    """Idle timeout of REST connections, in seconds. More than that of a load balancer in front (60 for nginx and AWS), so that it
    sends no request on a connection that is being closed."""

    write_timeout_s: float = Field(30.0, gt=0)
    """Seconds without progress after which a REST connection is closed whose client does not read the response."""

    @property
    def server_metadata(self) -> ServerMetadata:
        """The answer to ServerMetadata and to ``GET /v2``."""
        own = super().server_metadata
        return ServerMetadata("splitserve", own.version, ("binary_tensor_data", *own.extensions))

    @property
    def grpc_config(self) -> GrpcConfig:
        """That of the gRPC face; unlike inner stages, the proxy limits deadlines and sends push-back."""
        return msgspec.structs.replace(
            super().grpc_config,
            default_timeout_s=self.default_timeout_s,
            max_timeout_s=self.max_timeout_s,
            retry_after_s=RETRY_AFTER_S,
        )

    @property
    def rest_config(self) -> RestConfig:
        """Configuration of the REST face."""
        return RestConfig(
            metadata=self.server_metadata,
            host=self.host,
            port=self.http_port,
            shares_port=self.shares_ports,
            tls=self.tls,
            max_body_bytes=self.max_message_bytes,
            default_timeout_s=self.default_timeout_s,
            max_timeout_s=self.max_timeout_s,
            retry_after_s=RETRY_AFTER_S,
            cors_origins=tuple(self.cors_origins.replace(",", " ").split()),
            allow_control=self.allow_repository_control,
            request_limits=self.limits,
            connection_limits=self.http_limits,
            drain_delay_s=self.drain_delay_s,
            grace_s=self.grace_s,
        )

    @property
    def http_limits(self) -> HttpLimits:
        """Limits on REST connections."""
        return HttpLimits(
            max_url_bytes=self.max_url_bytes,
            max_header_bytes=self.max_header_bytes,
            max_headers=self.max_headers,
            max_chunks=self.max_chunks,
            max_connections=self.max_connections,
            header_timeout_s=self.header_timeout_s,
            min_body_bytes_per_s=self.min_body_bytes_per_s,
            keep_alive_s=self.keep_alive_s,
            write_timeout_s=self.write_timeout_s,
        )

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, origins: str) -> str:
        for origin in origins.replace(",", " ").split():
            scheme, separator, host = origin.partition("://")
            if origin != "*" and not (separator and scheme.islower() and host and "/" not in host and "*" not in host):
                raise ValueError(f"expected origins like https://app.example.com, or *, got {origin}")
        return origins

    @field_validator("jobs_target")
    @classmethod
    def _check_jobs_target(cls, target: str) -> str:
        return check_target(target) if target else ""

    @field_validator("auth_file")
    @classmethod
    def _check_auth_file(cls, path: str) -> str:
        if path:
            from proxy.auth import read_policy  # imports cryptography

            try:
                read_policy(path)
            except OSError as error:
                raise ValueError(str(error)) from None
        return path
