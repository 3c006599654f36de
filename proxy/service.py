"""The proxy's service: binds a request to a pair, checks it against the pair's signature, forwards it. Knows no transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import structlog

from proxy.agreed_defaults import AgreedDefaults
from proxy.known_pairs import KnownPairs
from splitserve.batching.admission import HIGHEST_PRIORITY
from splitserve.batching.batcher import Batcher
from splitserve.batching.merging import is_mergeable
from splitserve.batching.queue import BatchLimits
from splitserve.catalogue import STILL_LOADING, why_not_ready
from splitserve.errors import NotFound, SplitserveError, Unavailable, at_stage
from splitserve.oip.ignored_inputs import ignored_inputs, without_ignored
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    DEFAULT,
    PRIORITY,
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
from splitserve.signature import InputCheck, OutputBytes, choose_outputs
from splitserve.versions import Pair, is_number, parse_pair

STAGE = "proxy"

MAX_REBINDS = 3
"""How many other releases a request without a version is tried with, when the one that it was bound to is gone."""

Indexes = Callable[[], Awaitable[list[list[ModelState]]]]
"""The index of each replica that answers."""


class BoundPair(msgspec.Struct, frozen=True):
    """What requests for a model and version are bound to, until the next refresh."""

    pair: str
    signature: ModelMetadata
    check: InputCheck
    ignored: frozenset[str]
    is_mergeable: bool
    output_bytes: OutputBytes


class ProxyService:
    """An `InferenceService` in front of preprocess.

    What is known of the pairs decides which one a request gets and whether we say "ready". Whether a pair can still be served
    is for preprocess to say: a request for a known pair is sent even if the last refresh found it unavailable.

    A request without a version is bound to the release that replicas of preprocess name as the default. If that release is gone
    when the request is sent, it is bound to another one.

    Requests that wait while a call to preprocess is in flight are merged into the next one.

    Args:
        preprocess: the next service.
        limits: of what is merged.
        n_replicas: how many replicas of the next service can be called now.
        indexes: the index of each replica; that of the service by default.
        max_message_bytes: the largest answer; a request whose answer would be larger is refused.
    """

    def __init__(
        self,
        preprocess: InferenceService,
        *,
        limits: Callable[[str], BatchLimits] | BatchLimits | None = None,
        n_replicas: Callable[[], int] = lambda: 1,
        indexes: Indexes | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._preprocess = preprocess
        self._bound: dict[tuple[str, str], BoundPair] = {}
        self.statistics = Statistics()
        self.batcher = Batcher(
            self._send, limits, n_backends=n_replicas, statistics=self.statistics, is_hop=True, to_caller=_named
        )
        self._log = structlog.get_logger()
        self._indexes = indexes or self._only_index
        self._known = KnownPairs(preprocess, clock=clock)
        self._defaults = AgreedDefaults(clock=clock)
        self._broken_link = STILL_LOADING
        self._is_settled = False
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def is_loaded(self) -> bool:
        """Always: the proxy loads nothing. Until it knows preprocess's pairs, each call is refused as UNAVAILABLE."""
        return True

    async def _only_index(self) -> list[list[ModelState]]:
        return [await self._preprocess.index()]

    async def refresh(self) -> None:
        """Fetch preprocess's pairs. A call during a refresh waits for that refresh."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        try:
            # At first, ready means that everything was loaded and proven, not only the first pair. Asked before the index: what
            # is loaded after the index was made is not in it.
            reason = "" if self._is_settled else await self._preprocess.not_ready_reason()
            indexes = await self._indexes()
            if self._is_settled and not any(indexes):
                reason = await self._preprocess.not_ready_reason()
            is_loading = STILL_LOADING in reason
            if any(indexes) and not is_loading:
                reason = ""  # the index says it of each model
            await self._known.update(indexes)
        except SplitserveError as error:
            if not self._broken_link:
                # Calls for known pairs are still attempted.
                self._log.warning("preprocess unreachable", reason=error.message)
            self._broken_link = error.message
            self._bound = {}
            return
        if self._broken_link and not reason:
            # Preprocess has answered with its index of models.
            self._log.info("preprocess reachable", models=self._known.catalogue.models())
        self._is_settled = self._is_settled or not is_loading
        self._broken_link = reason
        self._defaults.update(self._known.catalogue.models(), indexes)
        self._bound = {}

    async def infer(self, request: InferRequest) -> InferResponse:
        return await awaited(partial(self.begin, request))

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        began = time.monotonic()
        bound = self._bound.get((request.model, request.version)) or self._bind(request)
        if bound.ignored:
            request = without_ignored(request, bound.ignored)
        try:
            answer_bytes = self._check(bound, request)
            request = msgspec.structs.replace(request, version=bound.pair, is_pinned=bool(request.version))
            priority = HIGHEST_PRIORITY
            if PRIORITY in request.parameters:
                request, priority = _without_priority(request)
            return self.batcher.begin(
                request,
                on_answer,
                is_mergeable=bound.is_mergeable,
                priority=priority,
                answer_bytes=answer_bytes,
                began_at=began,
            )
        except Exception:
            self.statistics.of(request.model, bound.pair).failed(time.monotonic() - began)
            with at_stage(STAGE, model=request.model, pair=bound.pair):
                raise

    def bind(self, request: InferRequest) -> InferRequest:
        """The request with the pair that it gets now, checked against its signature: what a job keeps until it is sent.

        Raises:
            SplitserveError: as `begin`.
        """
        bound = self._bound.get((request.model, request.version)) or self._bind(request)
        request = without_ignored(request, bound.ignored)
        with at_stage(STAGE, model=request.model, pair=bound.pair):
            self._check(bound, request)
        return msgspec.structs.replace(request, version=bound.pair)

    def _check(self, bound: BoundPair, request: InferRequest) -> int:
        """The bytes that the answer will have at least.

        Raises:
            SplitserveError: the request does not fit the signature, or its answer would be too large.
        """
        bound.check(request.inputs)
        wanted: Sequence[str] = ()
        if request.outputs:
            wanted = choose_outputs(bound.signature.outputs, [output.name for output in request.outputs])
        answer_bytes = bound.output_bytes.at_least(request.n_rows, request.inputs, wanted)
        if answer_bytes > self._max_message_bytes:
            raise message_too_large("the answer", request.n_rows, answer_bytes, stage=STAGE, max_bytes=self._max_message_bytes)
        return answer_bytes

    def _bind(self, request: InferRequest) -> BoundPair:
        with at_stage(STAGE, model=request.model):
            pair, signature = self.choose(request.model, request.version)
            check = InputCheck(signature.inputs, widen=True)
            output_bytes = OutputBytes(signature.inputs, signature.outputs)
            ignored = ignored_inputs(signature)
            bound = BoundPair(str(pair), signature, check, ignored, is_mergeable(signature), output_bytes)
        self._bound[(request.model, request.version)] = bound
        return bound

    async def _send(self, request: InferRequest) -> InferResponse:
        try:
            return await self._call(request)
        except NotFound as error:
            if request.is_pinned or error.stage == STAGE:
                raise
            return await self._rebound(request, error)

    async def _rebound(self, request: InferRequest, gone: NotFound) -> InferResponse:
        """The answer of another release, after the chosen one was not found: on all replicas, or on the one that was called.

        Raises:
            Unavailable: there is no other, or they are gone too. A retry may help.
        """
        model, tried = request.model, [_pair(request)]
        known = self._known.signature(model, tried[0])
        for _ in range(MAX_REBINDS):
            await self.refresh()
            pair = self._defaults.next_after(model, tried)
            signature = self._known.signature(model, pair) if pair else None
            if pair is None or signature is None or (known and is_mergeable(known) and not is_mergeable(signature)):
                break
            tried.append(pair)
            # The release that a request without a version was bound to is gone; it is bound to the next one.
            self._log.info("request rebound", model=model, pair=request.version, to=str(pair))
            try:
                return await self._call(msgspec.structs.replace(request, version=str(pair)))
            except NotFound as error:
                gone = error
        raise Unavailable(gone.message, stage=gone.stage, model=model)

    async def _call(self, request: InferRequest) -> InferResponse:
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
        pairs = self._known.catalogue
        if self._broken_link and model not in pairs.models():
            raise Unavailable(self._broken_link, model=model[:128])
        asked = self._pair_of(model, version)
        if asked is None:
            asked = self._defaults.choose(model)
        elif gone := self._known.gone_signature(model, asked):
            return asked, gone
        return pairs.choose(model, asked)

    def _pair_of(self, model: str, version: str) -> Pair | None:
        """The pair that a request names; for a predictor's number alone, the newest ready release with that predictor.

        Clients of servers with plain version numbers send ``model_version="1"``.
        """
        pairs = self._known.catalogue
        if not is_number(version) or model not in pairs.models():
            return parse_pair(model, version)
        candidates = [pair for pair in pairs.ready_versions(model) if pair.predictor == int(version)]
        if not candidates:
            raise pairs.not_found(model, version)
        default = self._defaults.get(model)
        return default if default in candidates else max(candidates, key=lambda pair: (self._known.sequence(model, pair), pair))

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        with at_stage(STAGE, model=model):
            _, metadata = self.choose(model, version)
        versions = tuple(map(str, self._known.catalogue.ready_versions(model)))
        default = self._defaults.get(model)
        properties = {**metadata.properties, DEFAULT: str(default)} if default else metadata.properties
        return msgspec.structs.replace(metadata, versions=versions, properties=properties)

    async def index(self) -> list[ModelState]:
        states = [self._with_properties(state) for state in self._known.catalogue.index()]
        if self._broken_link:
            return [msgspec.structs.replace(state, state=UNAVAILABLE, reason=self._broken_link) for state in states]
        return states

    def _with_properties(self, state: ModelState) -> ModelState:
        """The state of a pair with preprocess's facts about its release, and whether it is the default here."""
        pair = parse_pair(state.name, state.version)
        if pair is None:
            return state
        properties = {name: fact for name, fact in self._known.properties(state.name, pair).items() if name != DEFAULT}
        if self._defaults.get(state.name) == pair:
            properties[DEFAULT] = "true"
        return msgspec.structs.replace(state, properties=properties)

    async def load(self, model: str) -> None:
        await self._preprocess.load(model)
        await self.refresh()

    async def unload(self, model: str) -> None:
        await self._preprocess.unload(model)
        await self.refresh()

    async def not_ready_reason(self) -> str:
        return self._broken_link or why_not_ready(self._known.catalogue.index())


def _pair(request: InferRequest) -> Pair:
    """The pair that a request was bound to."""
    pair = parse_pair(request.model, request.version)
    assert pair is not None, "each request that is sent names a pair"
    return pair


def _named(request: InferRequest, error: Exception) -> SplitserveError:
    """The error of a request that was bound to a pair."""
    return at_stage(STAGE, model=request.model, pair=request.version).named(error)


def _without_priority(request: InferRequest) -> tuple[InferRequest, int]:
    """The request without its priority, so that it can be merged with others, and the priority."""
    parameters = {name: value for name, value in request.parameters.items() if name != PRIORITY}
    return msgspec.structs.replace(request, parameters=parameters), max(HIGHEST_PRIORITY, int(request.parameters[PRIORITY]))
