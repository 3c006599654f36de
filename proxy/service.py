"""The proxy's service: binds a request to a pair, checks it against the pair's signature, forwards it. Knows no transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import chain

import msgspec
import structlog

from splitserve.batching.admission import HIGHEST_PRIORITY
from splitserve.batching.batcher import Batcher
from splitserve.batching.queue import BatchLimits
from splitserve.catalogue import STILL_LOADING, Catalogue, Entry, why_not_ready
from splitserve.errors import NotFound, SplitserveError, Unavailable, at_stage
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    DEFAULT,
    PRIORITY,
    READY,
    RELEASE_DIGEST,
    RELEASE_SEQUENCE,
    ROW_WISE,
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
from splitserve.server.agreement import Agreement
from splitserve.signature import InputCheck, OutputBytes, choose_outputs, is_row_wise
from splitserve.versions import UNNAMED, Pair, is_number, parse_pair

STAGE = "proxy"


MAX_REBINDS = 3
"""How many other releases a request without a version is tried with, when the one that it was bound to is gone."""

GONE_GRACE_S = 60.0
"""How long a pair that has left preprocess's index is still sent there, where it stays callable for a grace."""

BY_CALLER = "splitserve_version_by_caller"
"""Parameter, inside the proxy, of requests whose version the caller named: they are not bound to another one."""

Indexes = Callable[[], Awaitable[list[list[ModelState]]]]
"""The index of each replica that answers."""


class _Release(msgspec.Struct, frozen=True, order=True):
    """A pair as replicas have it, in the order of releases. ``sequence`` is 0 where no release names it."""

    sequence: int
    pair: Pair
    digest: str = ""


class _Target(msgspec.Struct, frozen=True):
    """What a request for a model and version gets, until the next refresh."""

    pair: str
    signature: ModelMetadata
    check: InputCheck
    is_mergeable: bool
    output_bytes: OutputBytes


class ProxyService:
    """An `InferenceService` in front of preprocess.

    What is known of the pairs decides which one a request gets and whether we say "ready". Whether a pair can still be served
    is for preprocess to say: a request for a known pair is sent even if the last refresh found it unavailable.

    Each replica of preprocess says which release serves requests without a version. Where they differ, the newest of these that
    all replicas have is used, so that such a request never finds a replica without it. If the release is gone all the same, the
    request is bound to another one.

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
        self._targets: dict[tuple[str, str], _Target] = {}
        self.statistics = Statistics()
        self._batcher = Batcher(self._send, limits, n_backends=n_replicas, statistics=self.statistics, to_caller=_named)
        self._log = structlog.get_logger()
        self._indexes = indexes or self._only_index
        self._clock = clock
        self._agreement: Agreement[_Release] = Agreement(clock=clock)
        self._pairs: Catalogue[Pair, ModelMetadata] = Catalogue()
        self._properties: dict[tuple[str, Pair], Mapping[str, str]] = {}
        self._gone: dict[tuple[str, Pair], tuple[float, ModelMetadata]] = {}
        """Pairs that have left the index: until when they are callable, and their signatures."""
        self._defaults: dict[str, Pair] = {}
        self._past_defaults: dict[str, dict[Pair, float]] = {}
        """When replicas last named each pair as the one for requests without a version."""
        self._default_problems: dict[str, str] = {}
        self._broken_link = STILL_LOADING
        self._is_settled = False
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def is_loaded(self) -> bool:
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
            indexes = await self._indexes()
            # At first, ready means that everything was loaded and proven, not only the first pair.
            needs_reason = not self._is_settled or not any(indexes)
            reason = await self._preprocess.not_ready_reason() if needs_reason else ""
            is_loading = STILL_LOADING in reason
            if any(indexes) and not is_loading:
                reason = ""  # the index says it of each model
            pairs, properties = await self._catalogue(indexes)
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
        self._is_settled = self._is_settled or not is_loading
        self._broken_link = reason
        self._remember_gone(pairs)
        self._pairs, self._properties = pairs, properties
        self._choose_defaults(indexes)
        self._targets = {}

    async def _catalogue(
        self, indexes: Sequence[Sequence[ModelState]]
    ) -> tuple[Catalogue[Pair, ModelMetadata], dict[tuple[str, Pair], Mapping[str, str]]]:
        """The pairs of all replicas with their signatures and properties, asking for those that are not known yet.

        A pair is ready if it is on one replica: calls for it go there.
        """
        pairs: Catalogue[Pair, ModelMetadata] = Catalogue()
        properties: dict[tuple[str, Pair], Mapping[str, str]] = {}
        for state in chain.from_iterable(indexes):
            if not state.version:
                pairs.put_incomplete(state.name, state.reason)
            elif pair := parse_pair(state.name, state.version):
                known = pairs.entries(state.name).get(pair)
                if known is None or (known.state != READY and state.state == READY):
                    properties[(state.name, pair)] = state.properties
                    pairs.put(state.name, pair, Entry(state.state, state.reason, await self._signature(state, pair)))
        return pairs, properties

    async def _signature(self, state: ModelState, pair: Pair) -> ModelMetadata | None:
        known = self._pairs.entries(state.name).get(pair)
        digest = self._properties.get((state.name, pair), {}).get(RELEASE_DIGEST, "")
        is_same = digest == state.properties.get(RELEASE_DIGEST, "") and pair.predictor != UNNAMED
        if known and known.value is not None and known.state == state.state and is_same:
            return known.value
        if state.state != READY:
            return known.value if known else None
        try:
            return await self._preprocess.metadata(state.name, state.version)
        except (NotFound, Unavailable):  # unloaded since the index was made
            return None

    def _remember_gone(self, pairs: Catalogue[Pair, ModelMetadata]) -> None:
        """Keep pairs that have left the index callable for a while, for requests that name them."""
        now = self._clock()
        self._gone = {key: gone for key, gone in self._gone.items() if gone[0] > now and key not in pairs}
        for model in self._pairs.models():
            for pair, entry in self._pairs.entries(model).items():
                if entry.value is not None and (model, pair) not in pairs:
                    self._gone[(model, pair)] = (now + GONE_GRACE_S, entry.value)

    def _choose_defaults(self, indexes: Sequence[Sequence[ModelState]]) -> None:
        """Which pair serves requests without a version, where replicas say so."""
        now = self._clock()
        self._defaults, self._default_problems = {}, {}
        for model in self._pairs.models():
            named: set[_Release] = set()
            replicas: list[set[_Release]] = []
            problem = ""
            for index in indexes:
                states = [state for state in index if state.name == model]
                ready = {_release(state) for state in states if state.version and state.state == READY}
                named |= {_release(state) for state in states if state.properties.get(DEFAULT) == "true"}
                problem = problem or next((state.reason for state in states if not state.version), "")
                replicas.append(ready)
            shared = set.intersection(*replicas) if replicas else set()
            candidates = named if named & shared else named | {each for each in shared if named and each <= max(named)}
            chosen = self._agreement.choose(model, sorted(candidates), replicas)
            if chosen is not None or named:
                self._defaults[model] = (chosen or max(named)).pair
            elif not named and problem and any(replicas):
                self._default_problems[model] = problem
            past = self._past_defaults.setdefault(model, {})
            past.update((release.pair, now) for release in named)

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
            if request.version:
                request = msgspec.structs.replace(
                    request, version=target.pair, parameters={**request.parameters, BY_CALLER: True}
                )
            else:
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
            target = _Target(str(pair), signature, check, _is_mergeable(signature), output_bytes)
        self._targets[(request.model, request.version)] = target
        return target

    async def _send(self, request: InferRequest) -> InferResponse:
        if BY_CALLER in request.parameters:
            parameters = {name: value for name, value in request.parameters.items() if name != BY_CALLER}
            return await self._call(msgspec.structs.replace(request, parameters=parameters))
        try:
            return await self._call(request)
        except NotFound as error:
            if error.stage == STAGE:
                raise
            return await self._rebound(request, error)

    async def _rebound(self, request: InferRequest, gone: NotFound) -> InferResponse:
        """The answer of another release: the one that was chosen is gone, be it from all replicas or from the one that was asked.

        Raises:
            Unavailable: there is no other, or they are gone too. A retry may help.
        """
        model, tried, known = request.model, [request.version], self._signature_of(request.model, request.version)
        for _ in range(MAX_REBINDS):
            await self.refresh()
            pair = self._next_default(model, tried)
            signature = self._signature_of(model, pair)
            if signature is None or (known is not None and _is_mergeable(known) and not _is_mergeable(signature)):
                break
            tried.append(pair)
            # The release that a request without a version was bound to is gone; it is bound to the next one.
            self._log.info("request rebound", model=model, pair=request.version, to=pair)
            try:
                return await self._call(msgspec.structs.replace(request, version=pair))
            except NotFound as error:
                gone = error
        raise Unavailable(gone.message, stage=gone.stage, model=model)

    def _next_default(self, model: str, tried: Sequence[str]) -> str:
        """The pair to try after those; "" if there is none. Only pairs that a replica named as the default a short while ago."""
        past, now = self._past_defaults.get(model, {}), self._clock()
        recent = sorted((pair for pair, at in past.items() if now - at < GONE_GRACE_S), key=past.__getitem__, reverse=True)
        chosen = [default] if (default := self._defaults.get(model)) else []
        return next((str(pair) for pair in (*chosen, *recent) if str(pair) not in tried), "")

    def _signature_of(self, model: str, version: str) -> ModelMetadata | None:
        pair = parse_pair(model, version)
        entry = self._pairs.entries(model).get(pair) if pair else None
        return entry.value if entry else None

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
        if self._broken_link and model not in self._pairs.models():
            raise Unavailable(self._broken_link, model=model[:128])
        asked = self._pair_of(model, version)
        if asked is None:
            if problem := self._default_problems.get(model):
                raise Unavailable(f'model "{model}": no release is chosen: {problem}; name a version', model=model)
            asked = self._defaults.get(model)
        elif (model, asked) not in self._pairs and (model, asked) in self._gone:
            return asked, self._gone[(model, asked)][1]
        return self._pairs.choose(model, asked)

    def _pair_of(self, model: str, version: str) -> Pair | None:
        """The pair that a request names; for a predictor's number alone, the newest ready release with that predictor.

        Clients of servers with plain version numbers send ``model_version="1"``.
        """
        if not is_number(version) or model not in self._pairs.models():
            return parse_pair(model, version)
        pairs = [pair for pair in self._pairs.ready_versions(model) if pair.predictor == int(version)]
        if not pairs:
            raise self._pairs.not_found(model, version)
        default = self._defaults.get(model)
        return default if default in pairs else max(pairs, key=lambda pair: (self._sequence(model, pair), pair))

    def _sequence(self, model: str, pair: Pair) -> int:
        """The number of a pair's release; 0 if it has none."""
        sequence = self._properties.get((model, pair), {}).get(RELEASE_SEQUENCE, "")
        return int(sequence) if sequence.isdecimal() else 0

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        with at_stage(STAGE, model=model):
            _, metadata = self.choose(model, version)
        versions = tuple(map(str, self._pairs.ready_versions(model)))
        default = self._defaults.get(model)
        properties = {**metadata.properties, DEFAULT: str(default)} if default else metadata.properties
        return msgspec.structs.replace(metadata, versions=versions, properties=properties)

    async def index(self) -> list[ModelState]:
        states = [self._with_properties(state) for state in self._pairs.index()]
        if self._broken_link:
            return [msgspec.structs.replace(state, state=UNAVAILABLE, reason=self._broken_link) for state in states]
        return states

    def _with_properties(self, state: ModelState) -> ModelState:
        """The state of a pair with what preprocess says of its release, and which pair is the default here."""
        pair = parse_pair(state.name, state.version)
        if pair is None:
            return state
        properties = {name: fact for name, fact in self._properties[(state.name, pair)].items() if name != DEFAULT}
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
        return self._broken_link or why_not_ready(self._pairs.index())


def _release(state: ModelState) -> _Release:
    """What a replica says of a pair."""
    pair = parse_pair(state.name, state.version)
    assert pair is not None, "states without a version are left out"
    sequence = state.properties.get(RELEASE_SEQUENCE, "")
    return _Release(int(sequence) if sequence.isdecimal() else 0, pair, state.properties.get(RELEASE_DIGEST, ""))


def _is_mergeable(signature: ModelMetadata) -> bool:
    """Whether requests can be merged: each row has its own answer, whatever the others are."""
    return signature.properties.get(ROW_WISE) != "false" and is_row_wise(signature.inputs, signature.outputs)


def _named(request: InferRequest, error: Exception) -> SplitserveError:
    """The error of a request that was bound to a pair."""
    return at_stage(STAGE, model=request.model, pair=request.version).named(error)


def _without_priority(request: InferRequest) -> tuple[InferRequest, int]:
    """The request without its priority, so that it can be merged with others, and the priority."""
    parameters = {name: value for name, value in request.parameters.items() if name != PRIORITY}
    return msgspec.structs.replace(request, parameters=parameters), max(HIGHEST_PRIORITY, int(request.parameters[PRIORITY]))
