"""Settings of the preprocess service: environment variables that begin with ``PREPROCESS_``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import msgspec
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from splitserve.server import kserve, settings
from splitserve.server.face_settings import FaceSettings
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.settings import ComputeSettings, RepositorySettings
from splitserve.server.tls_settings import NextStageTlsSettings


class PreprocessSettings(NextStageTlsSettings, FaceSettings, ComputeSettings, RepositorySettings):
    """Settings of the preprocess service."""

    model_config = SettingsConfigDict(env_prefix="PREPROCESS_")
    stage = "preprocess"

    grpc_port: int = Field(8011, ge=0, le=65535)
    """Port of the gRPC face."""

    predict_target: str = "127.0.0.1:8021"
    """Where predict is: a gRPC name. `dns:///predict:8021` uses every address that the name has."""

    default_timeout_s: float = Field(0.0, ge=0)
    """Seconds that a request may take if its caller sets no deadline; 0: any time. The proxy always sets one."""

    trusted_modules: str = ""
    """Modules whose types may be loaded from a bundle, separated by commas: those of your transformers, installed here too."""

    allow_environment_mismatch: bool = False
    """Load bundles of another minor version of scikit-learn and rely on their golden samples."""

    allow_unsafe_pickle: bool = False
    """Load transforms that are pickles, which run any code: whoever can write to the model repository is then master here."""

    allow_fingerprint_mismatch: bool = False
    """Pair halves that fit in shape although the features mean something else than the predictor was trained on."""

    runtime: Literal["auto", "sklearn", "onnx"] = "auto"
    """What runs the transforms: `auto` the compiled form of those bundles that have one and no plan, which costs less, if ONNX
    Runtime is installed (`splitserve[compiled]`), else scikit-learn; `sklearn` never; `onnx` refuses a bundle without one."""

    @property
    def grpc_config(self) -> GrpcConfig:
        """That of the gRPC face."""
        return msgspec.structs.replace(super().grpc_config, default_timeout_s=self.default_timeout_s)


def read(arguments: Sequence[str]) -> PreprocessSettings:
    """Settings from the environment and from KServe's arguments for a transformer.

    What is wrong ends the process with status 2 and a line that names it.
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
