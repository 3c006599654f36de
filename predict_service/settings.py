"""Settings of the predict service: environment variables that begin with ``PREDICT_``."""

from __future__ import annotations

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from splitserve.server.admin_settings import AdminPort
from splitserve.server.face_settings import FaceSettings
from splitserve.server.settings import BatchingSettings, ComputeSettings, RepositorySettings


class PredictSettings(FaceSettings, ComputeSettings, RepositorySettings, BatchingSettings):
    """Settings of the predict service."""

    model_config = SettingsConfigDict(env_prefix="PREDICT_")
    stage = "predict"

    admin_port: AdminPort = 8022
    """Port of the admin listener; 0: any free one; off: none."""

    grpc_port: int = Field(8021, ge=0, le=65535)
    """Port of the gRPC face."""

    intra_op_num_threads: int = Field(1, ge=0)
    """Threads that ONNX Runtime may use for one run; 0: one per core. More than one helps with large models only."""

    providers: str = "CPUExecutionProvider"
    """ONNX Runtime's execution providers, in order of preference, separated by commas."""

    @property
    def provider_names(self) -> list[str]:
        """The execution providers, each by its name."""
        return [name.strip() for name in self.providers.split(",")]

    @field_validator("providers")
    @classmethod
    def _check_providers(cls, text: str) -> str:
        from splitserve.runtimes.predictor import available_providers  # takes a while to import; the default needs no check

        known = available_providers()
        if unknown := [name for each in text.split(",") if (name := each.strip()) not in known]:
            raise ValueError(f'expected some of {", ".join(known)}, which ONNX Runtime has here; got "{", ".join(unknown)}"')
        return text
