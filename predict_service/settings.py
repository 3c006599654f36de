"""What the predict service can be told, by environment variables that begin with ``PREDICT_``."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from splitserve.server.settings import BatchingSettings, RepositorySettings


class PredictSettings(RepositorySettings, BatchingSettings):
    """Settings of the predict service."""

    model_config = SettingsConfigDict(env_prefix="PREDICT_")

    grpc_port: int = Field(8021, ge=0, le=65535)
    """Port of the gRPC face."""

    intra_op_num_threads: int = Field(1, ge=1)
    """Threads that ONNX Runtime may use for one run. More than one pays for heavy models only."""

    providers: str = "CPUExecutionProvider"
    """ONNX Runtime's execution providers, most wanted first, separated by commas."""

    n_workers: int = Field(2, ge=1)
    """Threads that run models, so that runs overlap and health checks are answered meanwhile."""
