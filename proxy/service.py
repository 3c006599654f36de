"""The proxy's service: binds a request to a pair, checks it against the pair's signature, forwards it. Knows no transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import structlog

from splitserve.batching.admission import HIGHEST_PRIORITY
from splitserve.batching.batcher import Batcher
from splitserve.batching.queue import BatchLimits
from splitserve.catalogue import STILL_LOADING, Catalogue, Entry, why_not_ready
from splitserve.errors import NotFound, SplitserveError, Unavailable, at_stage
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    PRIORITY,
    READY,
    UNAVAILABLE,
    InferenceService,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    OnAnswer,
)
from splitserve.oip.pending import Pending, awaited
from splitserve.oip.statistics import Statistics, Stopwatch
from splitserve.signature import InputCheck, OutputBytes, choose_outputs, is_row_wise
from splitserve.versions import UNNAMED, Pair, is_number, parse_pair

STAGE = "proxy"


class _Target(msgspec.Struct, frozen=True):
    """The pair that requests for a model and version are bound to, until the next refresh."""

    pair: str
    signature: ModelMetadata
    check: InputCheck
    is_mergeable: bool
    output_bytes: OutputBytes


class ProxyService:
    """An `InferenceService` in front of preprocess.

    The pairs found by the last refresh decide which one a request is bound to, and readiness. Whether a pair can still be served
    is decided by preprocess: a request for a known pair is sent even if the last refresh found it unavailable.

    Requests that wait while a call to preprocess is in flight are merged into the next one.

    Args:
        preprocess: the next service.
        limits: of merged calls.
        n_replicas: how many replicas of the next service can be called now.
        max_message_bytes: the largest answer; a request whose answer would be larger is refused.
    """

    def __init__(
        self,
        preprocess: InferenceService,
        *,
        limits: Callable[[str], BatchLimits] | BatchLimits | None = None,
        n_replicas: Callable[[], int] = lambda: 1,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._preprocess = preprocess
        self._targets: dict[tuple[str, str], _Target] = {}
        self.statistics = Statistics()
        self._batcher = Batcher(self._send, limits, n_backends=n_replicas, statistics=self.statistics, to_caller=_named)
        self._log = structlog.get_logger()
        self._pairs: Catalogue[Pair, ModelMetadata] = Catalogue()
        self._broken_link = STILL_LOADING

    @property
    def is_loaded(self) -> bool:
        return True

    async def refresh(self) -> None:
        """Ask preprocess for its pairs."""
        try:
            states = await self._preprocess.index()
            reason = "" if states else await self._preprocess.not_ready_reason()
            pairs = await self._catalogue(states)
        except SplitserveError as error:
            if not self._broken_link:
                # Calls for known pairs are still attempted.
                self._log.warning("preprocess unreachable", reason=error.message)
            self._broken_link = error.message
            self._targets = {}
            return
        if self._broken_link and not reason:
            # Preprocess has answered with its index of models.
            self._log.info("preprocess reachable", models=pairs.models())
        self._broken_link = reason
        self._pairs = pairs
        self._targets = {}

    async def _catalogue(self, states: list[ModelState]) -> Catalogue[Pair, ModelMetadata]:
        """The pairs in an index with their signatures; unknown ones are asked for."""
        pairs: Catalogue[Pair, ModelMetadata] = Catalogue()
        for state in states:
            if not state.version:
                pairs.put_incomplete(state.name, state.reason)
            elif pair := parse_pair(state.name, state.version):
                pairs.put(state.name, pair, Entry(state.state, state.reason, await self._signature(state, pair)))
        return pairs

    async def _signature(self, state: ModelState, pair: Pair) -> ModelMetadata | None:
        known = self._pairs.entries(state.name).get(pair)
        if known and known.value is not None and known.state == state.state and pair.predictor != UNNAMED:
            return known.value
        if state.state != READY:
            return known.value if known else None
        try:
            return await self._preprocess.metadata(state.name, state.version)
        except (NotFound, Unavailable):  # unloaded since the index was made
            return None

    async def infer(self, request: InferRequest) -> InferResponse:
        return await awaited(partial(self.begin, request))

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        began = time.monotonic()
        target = self._targets.get((request.model, request.version)) or self._find_target(request)
        try:
            target.check(request.inputs)
            wanted: Sequence[str] = ()
            if request.outputs:
                wanted = choose_outputs(target.signature.outputs, [output.name for output in request.outputs])
            answer_bytes = target.output_bytes.at_least(request.n_rows, request.inputs, wanted)
            if answer_bytes > self._max_message_bytes:
                raise message_too_large(
                    "the answer", request.n_rows, answer_bytes, stage=STAGE, max_bytes=self._max_message_bytes
                )
            if request.version != target.pair:
                request = msgspec.structs.replace(request, version=target.pair)
            priority = HIGHEST_PRIORITY
            if PRIORITY in request.parameters:
                request, priority = _without_priority(request)
            return self._batcher.begin(
                request,
                on_answer,
                is_mergeable=target.is_mergeable,
                priority=priority,
                answer_bytes=answer_bytes,
                began_at=began,
            )
        except Exception:
            self.statistics.of(request.model, target.pair).failed(time.monotonic() - began)
            with at_stage(STAGE, model=request.model, pair=target.pair):
                raise

    def _find_target(self, request: InferRequest) -> _Target:
        with at_stage(STAGE, model=request.model):
            pair, signature = self.choose(request.model, request.version)
            check = InputCheck(signature.inputs, widen=True)
            output_bytes = OutputBytes(signature.inputs, signature.outputs)
            target = _Target(str(pair), signature, check, is_row_wise(signature.inputs, signature.outputs), output_bytes)
        self._targets[(request.model, request.version)] = target
        return target

    async def _send(self, request: InferRequest) -> InferResponse:
        watch = Stopwatch()
        response = await self._preprocess.infer(request)
        watch.end("infer")
        self.statistics.record_run(request.model, request.version, n_rows=request.n_rows, parts=watch.parts)
        return response

    def choose(self, model: str, version: str) -> tuple[Pair, ModelMetadata]:
        """The pair that a request for this version gets, and its signature.

        Raises:
            NotFound: no such model or pair.
            Unavailable: it is known and cannot be served, or nothing is known yet.
        """
        if self._broken_link and model not in self._pairs.models():
            raise Unavailable(self._broken_link, model=model[:128])
        return self._pairs.choose(model, self._pair_of(model, version))

    def _pair_of(self, model: str, version: str) -> Pair | None:
        """The pair that a request names; for a predictor's number alone, the newest ready pair with that predictor.

        Clients of servers with plain version numbers send ``model_version="1"``.
        """
        if not is_number(version) or model not in self._pairs.models():
            return parse_pair(model, version)
        pairs = [pair for pair in self._pairs.ready_versions(model) if pair.predictor == int(version)]
        if not pairs:
            raise self._pairs.not_found(model, version)
        return pairs[-1]

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        with at_stage(STAGE, model=model):
            _, metadata = self.choose(model, version)
        return msgspec.structs.replace(metadata, versions=tuple(map(str, self._pairs.ready_versions(model))))

    async def index(self) -> list[ModelState]:
        states = self._pairs.index()
        if self._broken_link:
            return [ModelState(state.name, state.version, UNAVAILABLE, self._broken_link) for state in states]
        return states

    async def load(self, model: str) -> None:
        await self._preprocess.load(model)
        await self.refresh()

    async def unload(self, model: str) -> None:
        await self._preprocess.unload(model)
        await self.refresh()

    async def not_ready_reason(self) -> str:
        return self._broken_link or why_not_ready(self._pairs.index())


def _named(request: InferRequest, error: Exception) -> SplitserveError:
    """The error of a request that was bound to a pair."""
    return at_stage(STAGE, model=request.model, pair=request.version).named(error)


def _without_priority(request: InferRequest) -> tuple[InferRequest, int]:
    """The request without its priority, so that it can be merged with others, and the priority."""
    parameters = {name: value for name, value in request.parameters.items() if name != PRIORITY}
    return msgspec.structs.replace(request, parameters=parameters), max(HIGHEST_PRIORITY, int(request.parameters[PRIORITY]))
