"""Which pairs can serve.

A pair is admitted if a release names it, its halves are the recorded ones and fit, and its golden samples give the recorded
answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from preprocess_service.golden_replay import IN_PROGRESS, GoldenReplay, PairUnderProof
from splitserve.catalogue import Catalogue, Entry, by_model
from splitserve.oip import classification
from splitserve.oip.ignored_inputs import IGNORED_INPUTS, encode_ignored
from splitserve.oip.input_columns import INPUT_COLUMNS, encode_columns
from splitserve.oip.messages import (
    EXPECTED_MANIFEST,
    LOADING,
    MANIFEST_SHA256,
    READY,
    RELEASE_DIGEST,
    RELEASE_SEQUENCE,
    ROW_WISE,
    UNAVAILABLE,
    InferenceService,
    ModelMetadata,
    ModelState,
    Parameter,
)
from splitserve.repository import pairing
from splitserve.repository.release import History, Release
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.server.repository_view import ModelView
from splitserve.server.store import VersionStore
from splitserve.signature import OutputBytes
from splitserve.versions import UNNAMED, Pair, is_predictor

NO_PREDICTOR = "the predict service does not have predictor"


class AdmittedPair(msgspec.Struct, frozen=True):
    """A preprocessor, the signature of the predictor that it fits, and the release that proves the two.

    ``release`` is None where a setting allows pairs without one.
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
        return properties_of(self.release) if self.release is not None else {}

    @property
    def _labels(self) -> tuple[Sequence[str], Mapping[str, Sequence[str]]]:
        """Those of the release, which has the predictor's too; without a release the preprocessor's."""
        known = self.release.manifest if self.release is not None else self.preprocessor.manifest
        return known.labels, known.output_labels

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
            classification.LABELS: classification.encode_labels(*self._labels),
            IGNORED_INPUTS: encode_ignored(self.preprocessor.manifest.ignored),
            INPUT_COLUMNS: encode_columns(self.preprocessor.manifest.columns),
            **self.release_properties,
        }
        return {name: fact for name, fact in facts.items() if fact}


def properties_of(release: Release) -> dict[str, str]:
    """Facts about a release, for index and metadata."""
    facts = {RELEASE_SEQUENCE: str(release.sequence), RELEASE_DIGEST: release.sha256}
    return facts if release.manifest.is_row_wise else {**facts, ROW_WISE: "false"}


class Admission(msgspec.Struct, frozen=True):
    """The outcome of matching the halves here with those at predict."""

    pairs: Catalogue[Pair, AdmittedPair]
    withdrawn: Mapping[tuple[str, Pair], AdmittedPair] = {}
    """By model and pair: not in the index any more, and still callable."""
    refused: Mapping[str, Collection[Pair]] = {}
    """By model, pairs that cannot serve: a half is refused by its stage, or the two do not give the recorded answers."""

    @property
    def has_proofs_in_progress(self) -> bool:
        return any(
            entry.reason.startswith(IN_PROGRESS) for model in self.pairs.models() for entry in self.pairs.entries(model).values()
        )


class PairMatcher:
    """Matches loaded preprocessors with the predictors of the next service.

    Args:
        preprocessors: the loaded versions.
        predict: the next service, asked for signatures.
        replay: proves releases in the background.
        allow_unreleased_pairs: admit pairs that no release names.
    """

    def __init__(
        self,
        preprocessors: VersionStore[Preprocessor],
        predict: InferenceService,
        replay: GoldenReplay,
        *,
        allow_unreleased_pairs: bool,
    ) -> None:
        self._preprocessors = preprocessors
        self._predict = predict
        self._replay = replay
        self._allow_unreleased_pairs = allow_unreleased_pairs
        self._signatures: dict[_SignatureKey, ModelMetadata] = {}

    async def fetch_signatures(self, predict_index: Sequence[ModelState]) -> None:
        """Ask for the signatures that are not known yet, or may have changed; forget those of versions that are gone."""
        models = self._preprocessors.catalogue.models()
        ready = [_signature_key(state) for state in predict_index if state.state == READY and state.name in models]
        # A third-party server reports no digest: the model under a version number, or without one, may change.
        known = {key: self._signatures[key] for key in ready if key in self._signatures and key[1] != str(UNNAMED)}
        for key in ready:
            if key not in known:
                known[key] = await self._predict.metadata(key[0], key[1])
        self._signatures = known

    def match(self, predict_index: Sequence[ModelState], before: Admission) -> Admission:
        """The pairs that releases name, and where a setting allows it all others, with what keeps them from serving.

        Args:
            predict_index: as of the last `fetch_signatures`.
            before: the last outcome. What it admitted and is withdrawn now stays callable.
        """
        pairs: Catalogue[Pair, AdmittedPair] = Catalogue()
        withdrawn: dict[tuple[str, Pair], AdmittedPair] = {}
        proofs: set[tuple[str, str]] = set()
        refused: dict[str, set[Pair]] = {}
        states_of = by_model(predict_index)
        for model in sorted({*self._preprocessors.catalogue.models(), *states_of}):
            view = self._preprocessors.models.get(model, ModelView())
            states = states_of.get(model, [])
            predictors = {int(state.version): state for state in states if is_predictor(state.version)}
            if incomplete := self._why_incomplete(model, states, predictors):
                pairs.put_incomplete(model, incomplete)
            releases = view.history.by_pair()
            for pair in self._candidates(model, predictors, view.history):
                entry = self._admit(model, pair, releases.get(pair), predictors, proofs)
                pairs.put(model, pair, entry)
                if entry.state == UNAVAILABLE and pair.predictor in predictors:  # what predict does not know it may still load
                    refused.setdefault(model, set()).add(pair)
            for pair in view.withdrawn:
                if (held := before.pairs.entries(model).get(pair)) and held.value is not None:
                    withdrawn[(model, pair)] = held.value
                elif (model, pair) in before.withdrawn:
                    withdrawn[(model, pair)] = before.withdrawn[(model, pair)]
            if view.route_problem:
                pairs.put_incomplete(model, view.route_problem)
        self._replay.keep(proofs)
        return Admission(pairs, withdrawn, refused)

    def _why_incomplete(self, model: str, states: Sequence[ModelState], predictors: Mapping[int, ModelState]) -> str:
        """Why a model has no pair; "" if it may have one.

        Args:
            model: its name.
            states: what predict's index says of it.
            predictors: those of them that have a version.
        """
        loaded = self._preprocessors.catalogue
        if not loaded.entries(model):
            if reasons := [state.reason for state in loaded.index() if state.name == model and state.reason]:
                return reasons[0]
            return "it has a predictor but no preprocessor"
        if not predictors:
            reasons = [state.reason for state in states if state.reason]
            return ": ".join(["it has a preprocessor but no predictor", *reasons[:1]])
        return ""

    def _candidates(self, model: str, predictors: Collection[int], history: History) -> list[Pair]:
        """Pairs with a release whose halves are held, or should be; where a setting allows it, all pairs of held halves whose
        releases were not withdrawn.
        """
        releases = history.by_pair()
        preprocessors = self._preprocessors.catalogue.entries(model)
        wanted = self._preprocessors.selected_pairs(model)
        found = {
            pair for pair in releases if pair.preprocessor in preprocessors and (pair.predictor in predictors or pair in wanted)
        }
        if self._allow_unreleased_pairs:
            found |= {
                Pair(preprocessor, predictor) for preprocessor in preprocessors for predictor in predictors
            } - history.taken_back()
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
        held = self._preprocessors.catalogue.entries(model)[pair.preprocessor]
        preprocessor = held.value
        if preprocessor is None:
            return Entry(held.state, held.reason)
        predictor = predictors.get(pair.predictor)
        if predictor is None:
            # One that is ready has a reason if the repository cannot be read there; another's says nothing about this one.
            reasons = {f": {state.reason}" for state in predictors.values() if state.state == READY and state.reason}
            why = "".join(sorted(reasons)[:1])
            return Entry(UNAVAILABLE, f"{NO_PREDICTOR} {pair.predictor}{why}")
        signature = self._signatures.get(_signature_key(predictor))
        if signature is None:
            return Entry(predictor.state, predictor.reason)
        if not signature.inputs or not signature.outputs:
            return Entry(UNAVAILABLE, "the predict service has no signature of the model; declare its inputs and outputs there")
        if differences := preprocessor.differences(signature.inputs, signature.outputs):
            return Entry(UNAVAILABLE, f"the halves do not fit: {'; '.join(differences)}")
        is_third_party = MANIFEST_SHA256 not in signature.properties
        if release is not None and release.manifest.predictor and self._allow_unreleased_pairs and is_third_party:
            release = None  # it proves our predictor, not the model of a third-party server
        warnings = preprocessor.warnings
        if release is not None:  # it was proven in numbers, whatever the features are called
            warnings += tuple(f"{what}, accepted by its release" for what in release.manifest.accepted)
        elif other := pairing.other_meaning(preprocessor.manifest, *pairing.meaning_from_properties(signature.properties)):
            return Entry(UNAVAILABLE, f'the halves do not fit: {other}; "splitserve release {model} {pair}" compares the numbers')
        if release is None:
            warnings += ("no release proves this pair, allowed by a setting",)
        elif problem := _other_halves(release, preprocessor, signature):
            return Entry(UNAVAILABLE, problem)
        else:
            proof = PairUnderProof(release, preprocessor, signature.outputs, signature.properties.get(MANIFEST_SHA256, ""))
            proofs.add(proof.key)
            refusal = self._replay.problem(proof)
            if refusal is None:
                return Entry(LOADING, self._replay.waiting_for(proof))
            if refusal:
                return Entry(UNAVAILABLE, refusal)
        answer_bytes = OutputBytes(signature.inputs, signature.outputs)
        reason = self._preprocessors.problem_of(model)
        return Entry(READY, reason, AdmittedPair(preprocessor, signature, answer_bytes, release, warnings))


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
            for proven, found in ((recorded.server_inputs, signature.inputs), (recorded.server_outputs, signature.outputs))
            for spec in proven
            if (spec.name, spec.datatype, spec.wire_shape) not in {(each.name, each.datatype, each.wire_shape) for each in found}
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
