"""Settings of the predict service: environment variables that begin with ``PREDICT_``."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from splitserve.server.face_settings import FaceSettings
from splitserve.server.settings import BatchingSettings, ComputeSettings, RepositorySettings


class PredictSettings(FaceSettings, ComputeSettings, RepositorySettings, BatchingSettings):
    """Settings of the predict service."""

    model_config = SettingsConfigDict(env_prefix="PREDICT_")
    stage = "predict"

    grpc_port: int = Field(8021, ge=0, le=65535)
    """Port of the gRPC face."""

    intra_op_num_threads: int = Field(1, ge=0)
    """Threads that ONNX Runtime may use for one run; 0: one per core. More than one helps with large models only."""

    providers: str = "CPUExecutionProvider"
    """ONNX Runtime's execution providers, in order of preference, separated by commas."""
