"""Settings of the preprocess service: environment variables that begin with ``PREPROCESS_``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import msgspec
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from splitserve.server import kserve, settings
from splitserve.server.admin_settings import AdminPort
from splitserve.server.face_settings import FaceSettings
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.settings import ComputeSettings, RepositorySettings, Target
from splitserve.server.tls_settings import NextStageTlsSettings


class PreprocessSettings(NextStageTlsSettings, FaceSettings, ComputeSettings, RepositorySettings):
    """Settings of the preprocess service."""

    model_config = SettingsConfigDict(env_prefix="PREPROCESS_")
    stage = "preprocess"

    admin_port: AdminPort = 8012
    """Port of the admin listener; 0: any free one; off: none."""

    grpc_port: int = Field(8011, ge=0, le=65535)
    """Port of the gRPC face."""

    predict_target: Target = "127.0.0.1:8021"
    """gRPC target of predict. `dns:///predict:8021` uses every address of the name."""

    default_timeout_s: float = Field(0.0, ge=0)
    """Deadline, in seconds, of requests that set none; 0: none. The proxy always sets one."""

    trusted_modules: str = ""
    """Modules whose types may be loaded from a bundle, separated by commas: those of your transformers, which must be
    installed."""

    allow_environment_mismatch: bool = False
    """Load bundles of another minor version of scikit-learn, or plans of another version of what they require, and rely on their
    golden samples."""

    allow_unsafe_pickle: bool = False
    """Load transforms that are pickles, which can run any code: write access to the model repository is then control of this
    service."""

    runtime: Literal["auto", "sklearn", "onnx"] = "auto"
    """What runs the transforms. `auto`: the plan of portable bundles, without scikit-learn; of others a plan that is made of
    their transforms, or the compiled form, if there is one and ONNX Runtime is installed (`splitserve[compiled]`), or
    scikit-learn. `sklearn`: load the transforms of every bundle, and never the compiled form. `onnx`: refuse bundles without
    one."""

    @property
    def grpc_config(self) -> GrpcConfig:
        """That of the gRPC face."""
        return msgspec.structs.replace(super().grpc_config, default_timeout_s=self.default_timeout_s)


def read(arguments: Sequence[str]) -> PreprocessSettings:
    """Settings from the environment and from KServe's arguments for a transformer.

    An invalid value ends the process with status 2 and a line that names it.
    """
    transformer = kserve.transformer(arguments)
    config = settings.read(PreprocessSettings, **transformer.settings)
    if transformer.uses_tls and config.next_tls is None:
        print(
            "--predictor_use_ssl: needs PREPROCESS_NEXT_CA_FILE, the authorities that may have signed its certificate",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return config
