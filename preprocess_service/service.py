"""What preprocess does: transform with K, call predict with M, postprocess with K. Knows no transport."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

import msgspec
import structlog

from preprocess_service.admission import NO_PREDICTOR, Admission, AdmittedPair, PairMatcher, properties_of
from preprocess_service.default_pairs import DefaultPairs
from preprocess_service.golden_replay import GoldenReplay
from splitserve.catalogue import STILL_LOADING, Catalogue, merged_index, why_not_ready
from splitserve.errors import InvalidInput, NotFound, PairMismatch, SplitserveError, Unavailable, at_stage
from splitserve.oip.ignored_inputs import without_ignored
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    DEFAULT,
    READY,
    UNAVAILABLE,
    InferenceService,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Needed,
    OnAnswer,
    check_time_left,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.oip.statistics import Statistics, Stopwatch
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.server.compute import Compute
from splitserve.server.repository_view import ModelView
from splitserve.server.store import VersionStore
from splitserve.signature import check_outputs, choose_outputs
from splitserve.tensors import Tensor
from splitserve.versions import UNNAMED, Pair, parse_pair, unknown_model

STAGE = "preprocess"
PLATFORM = "splitserve_pair"

SETTLE_TIMEOUT_S = 5.0
"""How long a refresh waits for golden samples that are being replayed; those that take longer count from a later refresh."""


class PreprocessService:
    """An `InferenceService` over pairs: the preprocessors here with the predictors of the next service.

    A pair serves if a release names it, both halves are the bundles that the release recorded, and its golden samples give the
    recorded answers through the whole chain. This service decides which pair serves requests that name no version: that of the
    route, else the newest release that is ready.

    Args:
        preprocessors: the loaded versions.
        predict: the next service.
        executor: where transforms run that take long.
        max_message_bytes: the largest message to predict and from it; features and answers that would be larger are refused.
        allow_unreleased_pairs: admit pairs that no release names; their metadata says so.
        predict_indexes: the index of each replica of predict, which is told what has to be held there; that of the service by
            default.
    """

    def __init__(
        self,
        preprocessors: VersionStore[Preprocessor],
        predict: InferenceService,
        executor: Executor,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        allow_unreleased_pairs: bool = False,
        predict_indexes: Callable[[Needed], Awaitable[list[list[ModelState]]]] | None = None,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._preprocessors = preprocessors
        self._predict = predict
        self._compute = Compute(executor)
        self.statistics = Statistics()
        self._log = structlog.get_logger()
        self._predict_indexes = predict_indexes or self._only_index
        self._replay = GoldenReplay(preprocessors, predict, self._compute, max_message_bytes=max_message_bytes)
        self._matcher = PairMatcher(
            preprocessors,
            predict,
            self._replay,
            allow_unreleased_pairs=allow_unreleased_pairs,
        )
        self._admission = Admission(Catalogue())
        self._defaults = DefaultPairs()
        self._broken_link = "the predict service was not called yet"
        self._is_matched = False
        self._is_settled = False

    @property
    def is_loaded(self) -> bool:
        """Whether the first loaded versions were matched with predict's: before, no pair is known."""
        return self._is_matched

    async def _only_index(self, _: Needed) -> list[list[ModelState]]:
        return [await self._predict.index()]

    async def refresh(self) -> None:
        """Fetch predict's index, match it with the loaded preprocessors, and prove new pairs."""
        # Asked before the index: what is loaded after the index was made is not in it.
        everything_is_loaded = self._preprocessors.is_loaded
        everything_is_known = everything_is_loaded and self._predict.is_loaded
        try:
            indexes = await self._predict_indexes(self._needed_predictors())
            predict_index = merged_index(indexes)
            await self._matcher.fetch_signatures(predict_index)
        except SplitserveError as error:
            if not self._broken_link:
                # Calls for known pairs are still attempted.
                self._log.warning("predict unreachable", reason=error.message)
            self._broken_link = error.message
        else:
            if self._broken_link:
                # Predict has answered with its index of models.
                self._log.info("predict reachable")
                self._replay.expire()
            self._broken_link = ""
            before = self._admission
            admission = self._matcher.match(predict_index, before)
            if admission.has_proofs_in_progress:
                await self._replay.settle(SETTLE_TIMEOUT_S)
                admission = self._matcher.match(predict_index, before)
            self._admission = admission
            self._preprocessors.refused_pairs = admission.refused
            self._defaults.update(admission.pairs, self._preprocessors.models, indexes)
            self._report_changes(before.pairs)
            self._is_settled = self._is_settled or (everything_is_known and not admission.has_proofs_in_progress)
        self._is_matched = self._is_matched or everything_is_loaded

    def _needed_predictors(self) -> Needed:
        """Predictors of older pairs, which predict does not hold by itself: it cannot know that newer pairs are refused."""
        pairs = self._preprocessors.beyond_policy()
        return [(model, pair.predictor) for model, pair in pairs if pair.predictor != UNNAMED]

    @property
    def golden_errors(self) -> Mapping[tuple[str, str], float]:
        """As `GoldenReplay.errors`."""
        return self._replay.errors()

    async def close(self) -> None:
        """Cancel replays in progress."""
        await self._replay.close()

    def _report_changes(self, before: Catalogue[Pair, AdmittedPair]) -> None:
        """Log each pair that has become ready or refused."""
        for model in self._admission.pairs.models():
            earlier = before.entries(model)
            for pair, entry in self._admission.pairs.entries(model).items():
                was = earlier.get(pair)
                if entry.state != (was.state if was else "") and entry.state == READY:
                    properties = entry.value.properties if entry.value else {}
                    facts = {key: properties[key] for key in ("preprocess_runtime", "warnings") if key in properties}
                    # The pair can serve. Further fields: `preprocess_runtime`, and `warnings` if there are any.
                    self._log.info("pair admitted", model=model, pair=str(pair), **facts)
                elif entry.state != UNAVAILABLE or entry.reason == (was.reason if was else ""):
                    continue
                elif entry.reason.startswith(NO_PREDICTOR):
                    # Predict has not loaded it, or not yet: preprocess may see a new release first.
                    self._log.warning("predictor missing", model=model, pair=str(pair), reason=entry.reason)
                else:
                    # The halves do not fit, or one of them is not loaded.
                    self._log.error("pair refused", model=model, pair=str(pair), reason=entry.reason)

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        return begin_task(partial(self.infer, request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        with at_stage(STAGE, model=request.model):
            pair, admitted = self._choose(request.model, request.version)
        request = without_ignored(request, admitted.preprocessor.ignored)
        with at_stage(STAGE, model=request.model, pair=str(pair)):
            check_time_left(request.deadline)
            with self.statistics.recorded(request.model, str(pair), n_rows=request.n_rows) as watch:
                outputs = await self._infer(request, pair, admitted, watch)
        return InferResponse(request.model, str(pair), outputs, request.id, phases=partial(_phases, watch))

    async def _infer(self, request: InferRequest, pair: Pair, admitted: AdmittedPair, watch: Stopwatch) -> tuple[Tensor, ...]:
        preprocessor = admitted.preprocessor
        wanted = choose_outputs(
            preprocessor.answer_specs(admitted.predictor.outputs), [output.name for output in request.outputs]
        )
        self._check_sizes(request, admitted)
        features = await self._compute.run(preprocessor, request.n_rows, _transform, preprocessor, request.inputs, watch)
        n_rows = features[0].n_rows
        watch.end("input")
        try:
            response = await self._predict.infer(
                InferRequest(
                    request.model,
                    preprocessor.sent(features),
                    version=str(pair.predictor),
                    id=request.id,
                    parameters=admitted.parameters,
                    deadline=request.deadline,
                    trace=request.trace,
                )
            )
        except InvalidInput as error:
            if preprocessor.passes_on:
                raise
            # The caller did not make these tensors.
            raise PairMismatch(f"the predictor refused what the preprocessor made: {error.message}", stage=error.stage) from error
        except NotFound as error:  # unloaded since the last refresh
            raise Unavailable(error.message, stage=error.stage) from error
        watch.end("infer")
        check_outputs(admitted.predictor.outputs, response.outputs, n_rows)
        answer = {tensor.name: tensor for tensor in preprocessor.answer(response.outputs)}
        watch.end("output")
        self.statistics.record_run(request.model, str(pair), n_rows=request.n_rows, parts=watch.parts)
        return tuple(answer[name] for name in wanted)

    def _check_sizes(self, request: InferRequest, admitted: AdmittedPair) -> None:
        """Refuse features and answers that no message can hold, before anything is computed.

        Raises:
            TooLarge: names the limit.
            InvalidInput: the inputs do not fit the signature, so that their rows mean nothing.
        """
        n_rows = request.n_rows
        sizes = {
            "the features": admitted.preprocessor.output_bytes.at_least(n_rows, request.inputs),
            "the answer": admitted.answer_bytes.at_least(n_rows),
        }
        for what, n_bytes in sizes.items():
            if n_bytes > self._max_message_bytes:
                admitted.preprocessor.check(request.inputs)
                raise message_too_large(what, n_rows, n_bytes, stage=STAGE, max_bytes=self._max_message_bytes)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        _, admitted = self._choose(model, version)
        default = self._defaults.get(model)
        return ModelMetadata(
            model,
            tuple(map(str, self._admission.pairs.ready_versions(model))),
            PLATFORM,
            admitted.preprocessor.inputs,
            admitted.preprocessor.answer_specs(admitted.predictor.outputs),
            {**admitted.properties, DEFAULT: str(default)} if default else admitted.properties,
        )

    async def index(self) -> list[ModelState]:
        states = [self._with_properties(state) for state in self._admission.pairs.index()]
        if self._broken_link:
            return [msgspec.structs.replace(state, state=UNAVAILABLE, reason=self._broken_link) for state in states]
        return states

    def _with_properties(self, state: ModelState) -> ModelState:
        """The state of a pair, with the facts of its release: also of one that is not ready, which an operator looks for."""
        if not state.version:
            return state
        pair = parse_pair(state.name, state.version)
        assert pair is not None, "the catalogue has pairs only"
        entry = self._admission.pairs.entries(state.name)[pair]
        if entry.value is not None:
            properties = entry.value.release_properties
        else:
            view = self._preprocessors.models.get(state.name, ModelView())
            release = view.history.release_of(pair)
            properties = properties_of(release) if release is not None else {}
        if self._defaults.get(state.name) == pair:
            properties[DEFAULT] = "true"
        return msgspec.structs.replace(state, properties=properties)

    async def not_ready_reason(self) -> str:
        if not self.is_loaded:
            return self._preprocessors.problem or STILL_LOADING
        if not self._is_settled and not self._broken_link:
            return STILL_LOADING
        return self._broken_link or why_not_ready(self._admission.pairs.index())

    async def load(self, model: str) -> None:
        """Poll the repository at both halves; the model is unknown only if neither has it."""
        failures = []
        for half in (self._predict, self._preprocessors):
            try:
                await half.load(model)
            except NotFound as error:
                failures.append(error)
        if len(failures) == 2:
            raise failures[0]
        await self.refresh()

    async def unload(self, model: str) -> None:
        """The preprocessors' half; predict may serve others."""
        await self._preprocessors.unload(model)
        await self.refresh()

    def _choose(self, model: str, version: str) -> tuple[Pair, AdmittedPair]:
        pairs = self._admission.pairs
        if model not in pairs.models() and (reason := STILL_LOADING if not self.is_loaded else self._broken_link):
            raise Unavailable(reason, model=model[:128])
        asked = parse_pair(model, version)
        if asked is None:
            asked = self._defaults.choose(model)
        elif (model, asked) not in pairs:
            if (model, asked) in self._admission.withdrawn:
                return asked, self._admission.withdrawn[(model, asked)]
            self._check_released(model, asked)
        pair, admitted = pairs.choose(model, asked)
        self._preprocessors.touch(model, pair.preprocessor)
        return pair, admitted

    def _check_released(self, model: str, pair: Pair) -> None:
        """Raises:
        NotFound: the halves of a pair are published, and no release names it.
        """
        view = self._preprocessors.models.get(model, ModelView())
        if pair.preprocessor in view.published and pair not in view.history.by_pair():
            raise NotFound(
                f'{unknown_model(model)}, version {pair}: no release names this pair; "splitserve release {model} {pair}" proves '
                "it and makes one",
                model=model,
            )


def _phases(watch: Stopwatch) -> dict[str, float]:
    parts = watch.parts
    return {"queue": parts["queue"] / 1e9, "compute": (parts["input"] + parts["output"]) / 1e9, "hop": parts["infer"] / 1e9}


def _transform(preprocessor: Preprocessor, inputs: Sequence[Tensor], watch: Stopwatch) -> tuple[Tensor, ...]:
    watch.end("queue")
    return preprocessor.transform(inputs)
