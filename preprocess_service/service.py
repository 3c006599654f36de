"""What preprocess does: transform with K, call predict with M, postprocess with K. Knows no transport."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor

import msgspec
import structlog

from preprocess_service.golden_replay import IN_PROGRESS, GoldenReplay, PairUnderProof
from splitserve.catalogue import STILL_LOADING, Catalogue, Entry, merged_index, why_not_ready
from splitserve.errors import InvalidInput, NotFound, PairMismatch, SplitserveError, Unavailable, at_stage
from splitserve.oip import classification
from splitserve.oip.limits import MAX_MESSAGE_BYTES, message_too_large
from splitserve.oip.messages import (
    DEFAULT,
    EXPECTED_MANIFEST,
    LOADING,
    MANIFEST_SHA256,
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
    Parameter,
    check_time_left,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.oip.statistics import Statistics, Stopwatch
from splitserve.repository import pairing
from splitserve.repository.release import Release
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.server.agreement import Agreement
from splitserve.server.compute import Compute
from splitserve.server.repository_view import ModelView
from splitserve.server.store import VersionStore
from splitserve.signature import OutputBytes, check_outputs, choose_outputs
from splitserve.tensors import Tensor
from splitserve.versions import UNNAMED, Pair, is_predictor, parse_pair, unknown_model

STAGE = "preprocess"
PLATFORM = "splitserve_pair"


SETTLE_TIMEOUT_S = 5.0
"""How long a refresh waits for golden samples that are being replayed; those that take longer count from a later refresh."""


class AdmittedPair(msgspec.Struct, frozen=True):
    """A preprocessor, the signature of the predictor that it fits, and the release that proves the two.

    ``release`` is None where a setting allows pairs without one, and where the pair's last release was withdrawn.
    """

    preprocessor: Preprocessor
    predictor: ModelMetadata
    answer_bytes: OutputBytes
    release: Release | None = None
    warnings: tuple[str, ...] = ()

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters of each call to predict: the digest of the expected bundle, if predict is ours and reports digests."""
        digest = self.predictor.properties.get(MANIFEST_SHA256, "")
        return {EXPECTED_MANIFEST: digest} if digest else {}

    @property
    def release_properties(self) -> dict[str, str]:
        """Facts about the release, for index and metadata."""
        if self.release is None:
            return {}
        facts = {RELEASE_SEQUENCE: str(self.release.sequence), RELEASE_DIGEST: self.release.sha256}
        return facts if self.release.manifest.is_row_wise else {**facts, ROW_WISE: "false"}

    @property
    def properties(self) -> dict[str, str]:
        """Facts about the pair, for its metadata."""
        facts = {
            "fingerprint": self.preprocessor.manifest.fingerprint,
            "preprocess_runtime": self.preprocessor.runtime,
            "preprocessor_created": self.preprocessor.manifest.created,
            "predictor_created": self.predictor.properties.get("created", ""),
            "warnings": "; ".join(self.warnings),
            "accepted": "; ".join(self.release.manifest.accepted) if self.release else "",
            classification.LABELS: msgspec.json.encode(labels).decode() if (labels := self.preprocessor.manifest.labels) else "",
            **self.release_properties,
        }
        return {name: fact for name, fact in facts.items() if fact}


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
        allow_fingerprint_mismatch: admit pairs whose halves fit in shape and not in meaning; their metadata says so.
        allow_unreleased_pairs: admit pairs that no release names; their metadata says so.
        predict_indexes: the index of each replica of predict; that of the service by default.
    """

    def __init__(
        self,
        preprocessors: VersionStore[Preprocessor],
        predict: InferenceService,
        executor: Executor,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        allow_fingerprint_mismatch: bool = False,
        allow_unreleased_pairs: bool = False,
        predict_indexes: Callable[[], Awaitable[list[list[ModelState]]]] | None = None,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._allow_fingerprint_mismatch = allow_fingerprint_mismatch
        self._allow_unreleased_pairs = allow_unreleased_pairs
        self._preprocessors = preprocessors
        self._predict = predict
        self._compute = Compute(executor)
        self.statistics = Statistics()
        self._log = structlog.get_logger()
        self._pairs: Catalogue[Pair, AdmittedPair] = Catalogue()
        self._withdrawn: dict[tuple[str, Pair], AdmittedPair] = {}
        """Not in the index any more, and still callable."""
        self._defaults: dict[str, Pair] = {}
        self._default_problems: dict[str, str] = {}
        """By model, why a request has to name a version."""
        self._signatures: dict[_SignatureKey, ModelMetadata] = {}
        self._predict_indexes = predict_indexes or self._only_index
        self._agreement: Agreement[Pair] = Agreement()
        self._replay = GoldenReplay(preprocessors, predict, self._compute, max_message_bytes=max_message_bytes)
        self._broken_link = "the predict service was not called yet"
        self._is_matched = False
        self._is_settled = False

    @property
    def is_loaded(self) -> bool:
        """Whether the first loaded versions were matched with predict's: before, no pair is known."""
        return self._is_matched

    async def _only_index(self) -> list[list[ModelState]]:
        return [await self._predict.index()]

    async def refresh(self) -> None:
        """Ask predict what it has, match it with what is here, and prove what is new."""
        everything_is_loaded = self._preprocessors.is_loaded
        try:
            indexes = await self._predict_indexes()
            predictors = merged_index(indexes)
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
                self._replay.expire()
            self._broken_link = ""
            before = self._pairs
            pairs = self._match(predictors)
            if self._has_proofs_in_progress(pairs):
                await self._replay.settle(SETTLE_TIMEOUT_S)
                pairs = self._match(predictors)
            self._pairs = pairs
            self._choose_defaults(indexes)
            self._report_changes(before)
            is_settled = everything_is_loaded and self._predict.is_loaded and not self._has_proofs_in_progress(pairs)
            self._is_settled = self._is_settled or is_settled
        self._is_matched = self._is_matched or everything_is_loaded

    def _has_proofs_in_progress(self, pairs: Catalogue[Pair, AdmittedPair]) -> bool:
        return any(entry.reason.startswith(IN_PROGRESS) for model in pairs.models() for entry in pairs.entries(model).values())

    async def close(self) -> None:
        """Cancel replays in progress."""
        await self._replay.close()

    def _report_changes(self, before: Catalogue[Pair, AdmittedPair]) -> None:
        """Log each pair that has become ready or refused."""
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
        ready = [_signature_key(state) for state in predictors if state.state == READY and state.name in mine]
        # A third-party server reports no digest: the model under a version number, or without one, may change.
        known = {key: self._signatures[key] for key in ready if key in self._signatures and key[1] != str(UNNAMED)}
        for key in ready:
            if key not in known:
                known[key] = await self._predict.metadata(key[0], key[1])
        self._signatures = known

    def _match(self, predictors: Sequence[ModelState]) -> Catalogue[Pair, AdmittedPair]:
        """The pairs that releases name, and where a setting allows it all others, with what keeps them from serving."""
        pairs: Catalogue[Pair, AdmittedPair] = Catalogue()
        withdrawn: dict[tuple[str, Pair], AdmittedPair] = {}
        proofs: set[tuple[str, str]] = set()
        mine = self._preprocessors.catalogue
        for model in sorted({*mine.models(), *(state.name for state in predictors)}):
            view = self._preprocessors.models.get(model, ModelView())
            theirs = {int(state.version): state for state in predictors if state.name == model and is_predictor(state.version)}
            if incomplete := self._why_incomplete(model, view, predictors, theirs):
                pairs.put_incomplete(model, incomplete)
            releases = view.history.by_pair()
            for pair in self._candidates(model, theirs, releases):
                release = releases.get(pair)
                entry = self._admit(model, pair, release, theirs, proofs)
                pairs.put(model, pair, entry)
            for pair in view.withdrawn:
                if (held := self._pairs.entries(model).get(pair)) and held.value is not None:
                    withdrawn[(model, pair)] = held.value
                elif (model, pair) in self._withdrawn:
                    withdrawn[(model, pair)] = self._withdrawn[(model, pair)]
            if view.route_problem:
                pairs.put_incomplete(model, view.route_problem)
        self._withdrawn = withdrawn
        self._replay.keep(proofs)
        return pairs

    def _why_incomplete(
        self, model: str, view: ModelView, predictors: Sequence[ModelState], theirs: Mapping[int, ModelState]
    ) -> str:
        """Why a model has no pair; "" if it may have one."""
        mine = self._preprocessors.catalogue
        if not mine.entries(model):
            if reasons := [state.reason for state in mine.index() if state.name == model and state.reason]:
                return reasons[0]
            return "it has a predictor but no preprocessor"
        if not theirs:
            reasons = [state.reason for state in predictors if state.name == model and state.reason]
            return ": ".join(["it has a preprocessor but no predictor", *reasons[:1]])
        return ""

    def _candidates(self, model: str, theirs: Mapping[int, ModelState], releases: Mapping[Pair, Release]) -> list[Pair]:
        """Pairs with a release whose halves are held, or should be; where a setting allows it all of halves that are held."""
        mine = self._preprocessors.catalogue.entries(model)
        wanted = self._preprocessors.selected_pairs(model)
        found = {pair for pair in releases if pair.preprocessor in mine and (pair.predictor in theirs or pair in wanted)}
        if self._allow_unreleased_pairs:
            found |= {Pair(number, version) for number in mine for version in theirs}
        return sorted(found)

    def _admit(
        self,
        model: str,
        pair: Pair,
        release: Release | None,
        predictors: Mapping[int, ModelState],
        proofs: set[tuple[str, str]],
    ) -> Entry[AdmittedPair]:
        """Whether a pair serves, or why not. A release that has to be proven is added to the proofs."""
        mine = self._preprocessors.catalogue.entries(model)[pair.preprocessor]
        if mine.value is None:
            return Entry(mine.state, mine.reason)
        theirs = predictors.get(pair.predictor)
        if theirs is None:
            why = "".join(sorted({f": {state.reason}" for state in predictors.values() if state.reason})[:1])
            return Entry(UNAVAILABLE, f"the predict service does not have predictor {pair.predictor}{why}")
        signature = self._signatures.get(_signature_key(theirs))
        if signature is None:
            return Entry(theirs.state, theirs.reason)
        if not signature.inputs or not signature.outputs:
            return Entry(UNAVAILABLE, "the predict service has no signature of the model; declare its inputs and outputs there")
        if differences := mine.value.differences(signature.inputs, signature.outputs):
            return Entry(UNAVAILABLE, f"the halves do not fit: {'; '.join(differences)}")
        is_ours = MANIFEST_SHA256 in signature.properties
        if release is not None and release.manifest.predictor and self._allow_unreleased_pairs and not is_ours:
            release = None  # it proves our predictor, not the model of a third-party server
        warnings = mine.value.warnings
        if release is not None:  # it was proven in numbers, whatever the features are called
            warnings += tuple(f"{what}, accepted by its release" for what in release.manifest.accepted)
        elif other := pairing.other_meaning(mine.value.manifest, *pairing.meaning_from_properties(signature.properties)):
            if not self._allow_fingerprint_mismatch:
                return Entry(UNAVAILABLE, f"the halves do not fit: {other}")
            warnings += (f"{other}, allowed by a setting",)
        if release is None:
            warnings += ("no release proves this pair, allowed by a setting",)
        elif problem := _other_halves(release, mine.value, signature):
            return Entry(UNAVAILABLE, problem)
        else:
            proof = PairUnderProof(release, mine.value, signature.outputs, signature.properties.get(MANIFEST_SHA256, ""))
            proofs.add(proof.key)
            refusal = self._replay.problem(proof)
            if refusal is None:
                return Entry(LOADING, self._replay.waiting_for(proof))
            if refusal:
                return Entry(UNAVAILABLE, refusal)
        answer_bytes = OutputBytes(signature.inputs, signature.outputs)
        reason = self._preprocessors.problem_of(model)
        return Entry(READY, reason, AdmittedPair(mine.value, signature, answer_bytes, release, warnings))

    def _choose_defaults(self, indexes: Sequence[Sequence[ModelState]]) -> None:
        """Which pair serves requests that name no version: one whose predictor is on all replicas of predict, if there is one."""
        before, self._defaults, self._default_problems = self._defaults, {}, {}
        for model in self._pairs.models():
            view = self._preprocessors.models.get(model, ModelView())
            ready = set(self._pairs.ready_versions(model))
            if view.default_problem:
                self._default_problems[model] = view.default_problem
            elif view.route is not None:
                pair = view.route.named()[0]
                if pair not in ready and before.get(model) in ready:
                    pair = before[model]  # the previous default serves until the route's pair is ready
                self._defaults[model] = pair
            elif candidates := [pair for pair in view.history.by_pair() if pair in ready] or sorted(ready):
                have = [{(state.name, state.version) for state in index if state.state == READY} for index in indexes]
                replicas = [{pair for pair in candidates if (model, str(pair.predictor)) in each} for each in have]
                self._defaults[model] = self._agreement.choose(model, candidates, replicas) or candidates[-1]

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
                    parameters=admitted.parameters,
                    deadline=request.deadline,
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
            tuple(map(str, self._pairs.ready_versions(model))),
            PLATFORM,
            admitted.preprocessor.inputs,
            admitted.preprocessor.answer_specs(admitted.predictor.outputs),
            {**admitted.properties, DEFAULT: str(default)} if default else admitted.properties,
        )

    async def index(self) -> list[ModelState]:
        states = [self._with_properties(state) for state in self._pairs.index()]
        if self._broken_link:
            return [msgspec.structs.replace(state, state=UNAVAILABLE, reason=self._broken_link) for state in states]
        return states

    def _with_properties(self, state: ModelState) -> ModelState:
        """The state of a pair with what is said of its release."""
        if not state.version:
            return state
        pair = parse_pair(state.name, state.version)
        assert pair is not None, "the catalogue has pairs only"
        entry = self._pairs.entries(state.name)[pair]
        properties = dict(entry.value.release_properties) if entry.value else {}
        if self._defaults.get(state.name) == pair:
            properties[DEFAULT] = "true"
        return msgspec.structs.replace(state, properties=properties)

    async def not_ready_reason(self) -> str:
        if not self.is_loaded:
            return self._preprocessors.problem or STILL_LOADING
        if not self._is_settled and not self._broken_link:
            return STILL_LOADING
        return self._broken_link or why_not_ready(self._pairs.index())

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
        if model not in self._pairs.models() and (reason := STILL_LOADING if not self.is_loaded else self._broken_link):
            raise Unavailable(reason, model=model[:128])
        asked = parse_pair(model, version)
        if asked is None:
            if problem := self._default_problems.get(model):
                raise Unavailable(f'model "{model}": no release is chosen: {problem}; name a version', model=model)
            asked = self._defaults.get(model)
        elif (model, asked) not in self._pairs:
            if (model, asked) in self._withdrawn:
                return asked, self._withdrawn[(model, asked)]
            self._check_released(model, asked)
        pair, admitted = self._pairs.choose(model, asked)
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


_SignatureKey = tuple[str, str, str]
"""Model, version, and the digest of the manifest if predict reports it."""


def _signature_key(state: ModelState) -> _SignatureKey:
    return state.name, state.version, state.properties.get(MANIFEST_SHA256, "")


def _other_halves(release: Release, preprocessor: Preprocessor, signature: ModelMetadata) -> str:
    """Which half is not the one that a release recorded; "" if both are."""
    recorded = release.manifest
    if recorded.proven == "server":
        changed = [
            f'"{spec.name}"'
            for mine, theirs in ((recorded.server_inputs, signature.inputs), (recorded.server_outputs, signature.outputs))
            for spec in mine
            if (spec.name, spec.datatype, spec.wire_shape) not in {(each.name, each.datatype, each.wire_shape) for each in theirs}
        ]
        if changed:
            return f"{release.key}: the predict server has another signature than was proven: {', '.join(changed)}"
    predictor = signature.properties.get(MANIFEST_SHA256, "")
    for half, expected, found in (
        ("preprocessor", recorded.preprocessor, preprocessor.manifest_sha256),
        ("predictor", recorded.predictor, predictor),
    ):
        if expected and expected != found:
            return (
                f"{release.key}: {half}: expected the bundle whose manifest has sha256 {expected}, got {found or 'none'}: it was "
                "replaced after the release; publish it as a new version"
            )
    return ""


def _transform(preprocessor: Preprocessor, inputs: Sequence[Tensor], watch: Stopwatch) -> tuple[Tensor, ...]:
    watch.end("queue")
    return preprocessor.transform(inputs)
