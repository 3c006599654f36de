"""What the proxy can be told, by environment variables that begin with ``PROXY_``."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from splitserve.server.settings import BatchingSettings


class ProxySettings(BatchingSettings):
    """Settings of the proxy."""

    model_config = SettingsConfigDict(env_prefix="PROXY_")

    http_port: int = Field(8000, ge=0, le=65535)
    """Port of the REST face."""

    grpc_port: int = Field(8001, ge=0, le=65535)
    """Port of the gRPC face."""

    preprocess_target: str = "127.0.0.1:8011"
    """Where preprocess is: a gRPC name. `dns:///preprocess:8011` uses every address that the name has."""

    default_timeout_s: float = Field(30.0, gt=0)
    """Seconds that a request may take if its caller sets no deadline."""

    max_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a request may take whatever its caller asks for."""
