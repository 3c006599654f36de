"""What preprocess does: transform with K, call predict with M, postprocess with K. Knows no transport."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Executor

import msgspec
import structlog

from splitserve.catalogue import STILL_LOADING, Catalogue, Entry, why_not_ready
from splitserve.errors import InvalidInput, NotFound, PairMismatch, SplitserveError, Unavailable, at_stage
from splitserve.oip import classification
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    READY,
    UNAVAILABLE,
    InferenceService,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    OnAnswer,
    check_time_left,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.oip.statistics import Statistics, Stopwatch
from splitserve.repository import pairing
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.server.compute import Compute
from splitserve.server.store import VersionStore
from splitserve.signature import OutputBytes, check_outputs, choose_outputs
from splitserve.tensors import Tensor
from splitserve.versions import UNNAMED, Pair, is_predictor, parse_pair

STAGE = "preprocess"
PLATFORM = "splitserve_pair"


class AdmittedPair(msgspec.Struct, frozen=True):
    """A preprocessor and the signature of the predictor that it fits."""

    preprocessor: Preprocessor
    predictor: ModelMetadata
    answer_bytes: OutputBytes
    warnings: tuple[str, ...] = ()

    @property
    def properties(self) -> dict[str, str]:
        """Facts about the pair, for its metadata."""
        facts = {
            "fingerprint": self.preprocessor.manifest.fingerprint,
            "preprocess_runtime": self.preprocessor.runtime,
            "preprocessor_created": self.preprocessor.manifest.created,
            "predictor_created": self.predictor.properties.get("created", ""),
            "warnings": "; ".join(self.warnings),
            classification.LABELS: msgspec.json.encode(labels).decode() if (labels := self.preprocessor.manifest.labels) else "",
        }
        return {name: fact for name, fact in facts.items() if fact}


class PreprocessService:
    """An `InferenceService` over pairs: the preprocessors here with the predictors of the service behind.

    Args:
        preprocessors: the loaded versions.
        predict: the service behind.
        executor: where transforms run that take long.
        max_message_bytes: the largest message to predict and from it; features and answers that would be larger are refused.
        allow_fingerprint_mismatch: admit pairs whose halves fit in shape and not in meaning; their metadata says so.
    """

    def __init__(
        self,
        preprocessors: VersionStore[Preprocessor],
        predict: InferenceService,
        executor: Executor,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        allow_fingerprint_mismatch: bool = False,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._allow_fingerprint_mismatch = allow_fingerprint_mismatch
        self._preprocessors = preprocessors
        self._predict = predict
        self._compute = Compute(executor)
        self.statistics = Statistics()
        self._log = structlog.get_logger()
        self._pairs: Catalogue[Pair, AdmittedPair] = Catalogue()
        self._signatures: dict[tuple[str, str], ModelMetadata] = {}
        self._broken_link = "the predict service has not been asked yet"
        self._is_matched = False

    @property
    def is_loaded(self) -> bool:
        """Whether what was loaded first has been matched with what predict has: before, a request would find no pair."""
        return self._is_matched

    async def refresh(self) -> None:
        """Look at what predict has, and match it with what is here."""
        everything_is_loaded = self._preprocessors.is_loaded
        try:
            predictors = await self._predict.index()
            await self._fetch_signatures(predictors)
        except SplitserveError as error:
            if not self._broken_link:
                # Calls for known pairs are still attempted.
                self._log.warning("predict unreachable", reason=error.message)
            self._broken_link = error.message
        else:
            if self._broken_link:
                # Predict has answered with its index of models.
                self._log.info("predict reachable")
            self._broken_link = ""
            before, self._pairs = self._pairs, self._match(predictors)
            self._report_changes(before)
            await self._keep_newest()
        self._is_matched = self._is_matched or everything_is_loaded

    async def _keep_newest(self) -> None:
        """Ask for the halves of each model's newest pair, so that neither is let go while it is the one that is chosen."""
        for model in self._pairs.models():
            if ready := self._pairs.ready_versions(model):
                self._preprocessors.touch(model, ready[-1].preprocessor)
                with contextlib.suppress(SplitserveError):
                    await self._predict.metadata(model, str(ready[-1].predictor))

    def _report_changes(self, before: Catalogue[Pair, AdmittedPair]) -> None:
        """A line for each pair that has become ready, or has become known to be refused."""
        for model in self._pairs.models():
            earlier = before.entries(model)
            for pair, entry in self._pairs.entries(model).items():
                was = earlier.get(pair)
                if entry.state != (was.state if was else "") and entry.state == READY:
                    properties = entry.value.properties if entry.value else {}
                    facts = {key: properties[key] for key in ("preprocess_runtime", "warnings") if key in properties}
                    # The pair can serve. Further fields: `preprocess_runtime`, and `warnings` if there are any.
                    self._log.info("pair admitted", model=model, pair=str(pair), **facts)
                elif entry.state == UNAVAILABLE and entry.reason != (was.reason if was else ""):
                    # The halves do not fit, or one of them is not loaded.
                    self._log.error("pair refused", model=model, pair=str(pair), reason=entry.reason)

    async def _fetch_signatures(self, predictors: Sequence[ModelState]) -> None:
        """Ask for the signatures that are not known yet, or may have changed; forget those of versions that are gone."""
        mine = self._preprocessors.catalogue.models()
        ready = [(state.name, state.version) for state in predictors if state.state == READY and state.name in mine]
        known = {key: signature for key, signature in self._signatures.items() if key in ready and key[1] != str(UNNAMED)}
        for key in ready:
            if key not in known:
                known[key] = await self._predict.metadata(*key)
        self._signatures = known

    def _match(self, predictors: Sequence[ModelState]) -> Catalogue[Pair, AdmittedPair]:
        """Every preprocessor version with every predictor version of the same model."""
        pairs: Catalogue[Pair, AdmittedPair] = Catalogue()
        mine = self._preprocessors.catalogue
        for model in sorted({*mine.models(), *(state.name for state in predictors)}):
            theirs = [state for state in predictors if state.name == model and is_predictor(state.version)]
            if not mine.entries(model):
                pairs.put_incomplete(model, "it has a predictor but no preprocessor")
            elif not theirs:
                reasons = [state.reason for state in predictors if state.name == model and state.reason]
                pairs.put_incomplete(model, ": ".join(["it has a preprocessor but no predictor", *reasons[:1]]))
            for number, entry in mine.entries(model).items():
                for state in theirs:
                    pair = Pair(number, int(state.version))
                    pairs.put(model, pair, self._admit(model, pair, entry, state))
        for model, reason in self._preprocessors.route_problems.items():
            pairs.put_incomplete(model, reason)
        return pairs

    def _admit(self, model: str, pair: Pair, mine: Entry[Preprocessor], theirs: ModelState) -> Entry[AdmittedPair]:
        signature = self._signatures.get((model, theirs.version))
        if mine.value is None:
            return Entry(mine.state, mine.reason)
        if signature is None:
            return Entry(theirs.state, theirs.reason)
        if not signature.inputs or not signature.outputs:
            return Entry(UNAVAILABLE, "the predict service does not say what the model takes and gives: declare it there")
        if differences := mine.value.differences(signature.inputs, signature.outputs):
            return Entry(UNAVAILABLE, f"the halves do not fit: {'; '.join(differences)}")
        warnings = mine.value.warnings
        if other := pairing.other_meaning(mine.value.manifest, *pairing.heard_meaning(signature.properties)):
            if not self._allow_fingerprint_mismatch:
                return Entry(UNAVAILABLE, f"the halves do not fit: {other}")
            warnings += (f"{other}, allowed by a setting",)
        return Entry(READY, value=AdmittedPair(mine.value, signature, OutputBytes(signature.inputs, signature.outputs), warnings))

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        return begin_task(self.infer(request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        with at_stage(STAGE, model=request.model):
            pair, admitted = self._choose(request.model, request.version)
        with at_stage(STAGE, model=request.model, pair=str(pair)):
            check_time_left(request.deadline)
            with self.statistics.recorded(request.model, str(pair), n_rows=request.n_rows) as watch:
                outputs = await self._infer(request, pair, admitted, watch)
        return InferResponse(request.model, str(pair), outputs, request.id)

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
                    deadline=request.deadline,
                )
            )
        except InvalidInput as error:
            if preprocessor.passes_on:
                raise
            # The caller did not make these tensors.
            raise PairMismatch(f"the predictor refused what the preprocessor made: {error.message}", stage=error.stage) from error
        except NotFound as error:  # it was there a moment ago
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
        return ModelMetadata(
            model,
            tuple(map(str, self._pairs.ready_versions(model))),
            PLATFORM,
            admitted.preprocessor.inputs,
            admitted.preprocessor.answer_specs(admitted.predictor.outputs),
            admitted.properties,
        )

    async def index(self) -> list[ModelState]:
        states = self._pairs.index()
        if self._broken_link:
            return [ModelState(state.name, state.version, UNAVAILABLE, self._broken_link) for state in states]
        return states

    async def not_ready_reason(self) -> str:
        if not self.is_loaded:
            return self._preprocessors.problem or STILL_LOADING
        return self._broken_link or why_not_ready(self._pairs.index())

    async def load(self, model: str) -> None:
        """Both halves look; the model is unknown only if neither has it."""
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
        if model not in self._pairs.models() and (reason := STILL_LOADING if not self.is_loaded else self._broken_link):
            raise Unavailable(reason, model=model[:128])
        pair, admitted = self._pairs.choose(model, parse_pair(model, version))
        self._preprocessors.touch(model, pair.preprocessor)
        return pair, admitted


def _transform(preprocessor: Preprocessor, inputs: Sequence[Tensor], watch: Stopwatch) -> tuple[Tensor, ...]:
    watch.end("queue")
    return preprocessor.transform(inputs)
