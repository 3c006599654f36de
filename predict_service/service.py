"""What predict does: versions of predictors, the latest by default. Knows no transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

import msgspec

from splitserve.batching.batcher import Batcher
from splitserve.batching.queue import BatchLimits
from splitserve.catalogue import STILL_LOADING, why_not_ready
from splitserve.errors import SplitserveError, Unavailable, at_stage
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    EXPECTED_MANIFEST,
    GOLDEN_REPLAY,
    MANIFEST_SHA256,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Needed,
    OnAnswer,
    check_time_left,
)
from splitserve.oip.pending import Pending, awaited, begin_task
from splitserve.oip.statistics import Statistics, Stopwatch
from splitserve.runtimes.predictor import Predictor, RunCanceller
from splitserve.server.compute import Compute
from splitserve.server.store import VersionStore
from splitserve.signature import choose_outputs
from splitserve.tensors import Tensor
from splitserve.versions import parse_version

STAGE = "predict"
PLATFORM = "onnx_onnxv1"
"""What clients of the protocol know ONNX models by. Source: Open Inference Protocol, "Platforms"."""


class PredictService:
    """An `InferenceService` over the predictors of a repository.

    Args:
        predictors: the loaded versions.
        executor: where models run that take long.
        limits: of what is merged.
        max_message_bytes: the largest answer; a request whose answer would be larger is refused before the model runs.
    """

    def __init__(
        self,
        predictors: VersionStore[Predictor],
        executor: Executor,
        *,
        limits: Callable[[str], BatchLimits] | BatchLimits | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._predictors = predictors
        self._compute = Compute(executor)
        self._replay_turn = asyncio.Lock()
        self.statistics = Statistics()
        self.batcher = Batcher(self._run, limits, send_inline=self._run_inline, statistics=self.statistics, to_caller=_named)

    @property
    def is_loaded(self) -> bool:
        return self._predictors.is_loaded

    async def infer(self, request: InferRequest) -> InferResponse:
        return await awaited(partial(self.begin, request))

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        began = time.monotonic()
        with at_stage(STAGE, model=request.model):
            check_time_left(request.deadline)
            version, predictor = self._bind(request)
            try:
                predictor.check(request.inputs)
                wanted = choose_outputs(predictor.outputs, _wanted(request)) if request.outputs else ()
                answer_bytes = predictor.output_bytes.at_least(request.n_rows, request.inputs, wanted)
                if answer_bytes > self._max_message_bytes:
                    raise message_too_large(
                        "the answer", request.n_rows, answer_bytes, stage=STAGE, max_bytes=self._max_message_bytes
                    )
                request = msgspec.structs.replace(request, version=str(version))
                if GOLDEN_REPLAY in request.parameters:
                    return begin_task(partial(self._replay, request, predictor), on_answer)
                return self.batcher.begin(
                    request, on_answer, is_mergeable=predictor.is_row_wise, answer_bytes=answer_bytes, began_at=began
                )
            except Exception:
                self.statistics.of(request.model, str(version)).failed(time.monotonic() - began)
                raise

    def _run_inline(self, request: InferRequest) -> InferResponse | None:
        """As `_run`, for a model that is quick; None for others."""
        version, predictor = self._bind(request)
        watch, wanted = Stopwatch(), _wanted(request)
        outputs = self._compute.run_inline(predictor, request.n_rows, predictor.infer, request.inputs, wanted, watch)
        return None if outputs is None else self._ran(request, version, outputs, watch)

    async def _run(self, request: InferRequest) -> InferResponse:
        version, predictor = self._bind(request)
        watch, canceller = Stopwatch(), RunCanceller()
        try:
            outputs = await self._compute.run(
                predictor, request.n_rows, predictor.infer, request.inputs, _wanted(request), watch, canceller
            )
        except asyncio.CancelledError:  # no caller waits, or the deadline has passed
            canceller.cancel()
            raise
        return self._ran(request, version, outputs, watch)

    def _ran(self, request: InferRequest, version: int, outputs: tuple[Tensor, ...], watch: Stopwatch) -> InferResponse:
        self.statistics.record_run(request.model, str(version), n_rows=request.n_rows, parts=watch.parts)
        return InferResponse(request.model, str(version), outputs, request.id)

    async def _replay(self, request: InferRequest, predictor: Predictor) -> InferResponse:
        """Golden rows of a release: one call at a time, in addition to those of clients, not merged with them and not counted."""
        async with self._replay_turn:
            outputs = await self._compute.run(predictor, request.n_rows, predictor.infer, request.inputs)
        return InferResponse(request.model, request.version, outputs, request.id)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        _, predictor = self._choose(model, version)
        versions = tuple(map(str, self._predictors.catalogue.ready_versions(model)))
        return ModelMetadata(model, versions, PLATFORM, predictor.inputs, predictor.outputs, predictor.properties)

    async def index(self) -> list[ModelState]:
        return self._predictors.index(lambda predictor: {MANIFEST_SHA256: predictor.manifest_sha256})

    async def indexes(self, needed: Needed = ()) -> list[list[ModelState]]:
        """`index`, as of the only replica, which holds what the caller needs."""
        self.hold(needed)
        return [await self.index()]

    def hold(self, needed: Needed) -> None:
        """Hold these predictors for a while, if releases name them, besides those of the settings."""
        self._predictors.need(needed)

    async def not_ready_reason(self) -> str:
        if not self.is_loaded:
            return self._predictors.problem or STILL_LOADING
        return why_not_ready(await self.index())

    def _bind(self, request: InferRequest) -> tuple[int, Predictor]:
        """The predictor that a request asks for, by its number and, if it names one, by the digest of its manifest.

        Raises:
            Unavailable: another bundle is loaded under this number: another replica may have the right one.
        """
        version, predictor = self._choose(request.model, request.version)
        if request.parameters:
            expected = request.parameters.get(EXPECTED_MANIFEST)
            if expected is not None and expected != predictor.manifest_sha256:
                raise Unavailable(
                    f"predictor {version} was replaced: expected the manifest with sha256 {str(expected)[:64]}, got "
                    f"{predictor.manifest_sha256}",
                    model=request.model,
                )
        return version, predictor

    def _choose(self, model: str, version: str) -> tuple[int, Predictor]:
        if not self.is_loaded and model not in self._predictors.catalogue.models():
            raise Unavailable(STILL_LOADING, model=model[:128])
        return self._predictors.choose(model, parse_version(model, version))

    async def load(self, model: str) -> None:
        await self._predictors.load(model)

    async def unload(self, model: str) -> None:
        await self._predictors.unload(model)


def _wanted(request: InferRequest) -> list[str]:
    """Names of the outputs that a request asks for; empty for all."""
    return [output.name for output in request.outputs]


def _named(request: InferRequest, error: Exception) -> SplitserveError:
    """The error of a request that was sent to a model."""
    return at_stage(STAGE, model=request.model).named(error)
