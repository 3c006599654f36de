"""What predict does: versions of predictors, the latest by default. Knows no transport."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from splitserve.oip import InferRequest, InferResponse, ModelMetadata, ModelState
from splitserve.runtimes.predictor import Predictor
from splitserve.server.versions import VersionStore, parse_version, why_not_ready

PLATFORM = "onnx_onnxv1"
"""What clients of the protocol know ONNX models by. Source: Open Inference Protocol, "Platforms"."""


class PredictService:
    """An `InferenceService` over the predictors of a repository.

    Args:
        predictors: the loaded versions.
        executor: where models run.
    """

    def __init__(self, predictors: VersionStore[Predictor], executor: Executor) -> None:
        self._predictors = predictors
        self._executor = executor

    @property
    def is_loaded(self) -> bool:
        return self._predictors.is_loaded

    async def infer(self, request: InferRequest) -> InferResponse:
        version, predictor = self._predictors.get(request.model, parse_version(request.model, request.version))
        outputs = await asyncio.get_running_loop().run_in_executor(
            self._executor, predictor.infer, request.inputs, [wanted.name for wanted in request.outputs]
        )
        return InferResponse(request.model, str(version), outputs, request.id)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        _, predictor = self._predictors.get(model, parse_version(model, version))
        versions = sorted(number for name, number in self._predictors.loaded() if name == model)
        return ModelMetadata(model, tuple(map(str, versions)), PLATFORM, predictor.inputs, predictor.outputs)

    async def index(self) -> list[ModelState]:
        return self._predictors.index()

    async def not_ready_reason(self) -> str:
        return why_not_ready(self._predictors.index(), self._predictors.is_loaded)
