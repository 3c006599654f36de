"""Verifies a running system: sends golden samples to it and compares the answers with the expected ones.

`promise` derives the expected answers of a pair to the golden rows of its preprocessor from its bundles, without scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError, Unavailable
from splitserve.oip.messages import ModelMetadata
from splitserve.repository import golden as goldens
from splitserve.repository import pairing
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.golden import Difference, Golden
from splitserve.repository.manifest import GOLDEN_FILE, BundleError, Manifest, Tolerance
from splitserve.repository.source import BundleSource, load_bundle
from splitserve.runtimes import postprocess
from splitserve.tensors import Tensor
from splitserve.versions import Pair, parse_pair


class ServerUnderTest(Protocol):
    """A client of the system to verify, over any transport."""

    def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
        """Raises:
        SplitserveError: the system rejected the request, or is unreachable.
        """
        ...

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Raises:
        SplitserveError: as `infer`.
        """
        ...


class Promise(msgspec.Struct, frozen=True):
    """The expected answer of a pair.

    ``is_recorded``: recorded when the pair was published; otherwise the predictor was run here on the recorded features.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerances: Mapping[str, Tolerance]
    is_recorded: bool

    @property
    def n_samples(self) -> int:
        """Number of rows."""
        return self.inputs[0].n_rows


class Outcome(msgspec.Struct, frozen=True):
    """The result for a pair: ``problem`` is "" if the answers agree; ``promise`` is None if it could not be derived."""

    model: str
    pair: str
    promise: Promise | None = None
    problem: str = ""
    worst: Difference | None = None


def promise(source: BundleSource, model: str, pair: Pair) -> Promise:
    """The expected answer of a pair to the golden rows of its preprocessor.

    The preprocessor's golden samples are rows with their features. If both halves were published together, the predictor's are
    these features with their outputs. Otherwise the predictor is loaded, its own samples are replayed, and it is run on these
    features. The postprocess step is applied last. Tolerances are those of the predictor's manifest; a probability has that of
    its score.

    Raises:
        BundleError: a half is missing, invalid or cannot be run here, or the halves do not fit.
    """
    preprocessor = _open(source, BundleKey(model, "preprocess", pair.preprocessor))
    predictor = _open(source, BundleKey(model, "predict", pair.predictor))
    rows, known = _golden(preprocessor), _golden(predictor)
    if differences := pairing.misfits(preprocessor.manifest, predictor.manifest.inputs, predictor.manifest.outputs):
        raise BundleError(f"the halves do not fit: {'; '.join(differences)}")
    features = pairing.sent(preprocessor.manifest, rows.outputs)
    is_recorded = {tensor.name: tensor for tensor in features} == {tensor.name: tensor for tensor in known.inputs}
    outputs = known.outputs if is_recorded else _run(source, predictor.key, features)
    return _postprocessed(preprocessor.manifest, predictor.manifest, rows.inputs, outputs, is_recorded)


def _open(source: BundleSource, key: BundleKey) -> Bundle:
    return load_bundle(source, key, lambda bundle: bundle)


def _golden(bundle: Bundle) -> Golden:
    try:
        return goldens.decode(bundle.read(GOLDEN_FILE), bundle.manifest.inputs, bundle.manifest.outputs)
    except BundleError as error:
        raise BundleError(f"{bundle.key}: {error}") from error


def _run(source: BundleSource, key: BundleKey, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        from splitserve.runtimes import predictor
    except ImportError as error:
        raise BundleError(
            f"{key} was not published together with its preprocessor, so it must be run here, which needs {error.name}: "
            'pip install "splitserve[predict]"'
        ) from error
    try:
        return load_bundle(source, key, predictor.load).infer(features)
    except SplitserveError as error:
        raise BundleError(f"{key}: {error.message}") from error


def _postprocessed(
    preprocessor: Manifest, predictor: Manifest, rows: tuple[Tensor, ...], outputs: tuple[Tensor, ...], is_recorded: bool
) -> Promise:
    step, tolerances = preprocessor.postprocess, dict(predictor.tolerances)
    if step is not None:
        outputs = postprocess.apply(step, preprocessor.labels, outputs)
        tolerances[pairing.PROBABILITIES] = tolerances.pop(step.scores, Tolerance())
    return Promise(rows, outputs, tolerances, is_recorded)


def pairs_of(source: BundleSource, server: ServerUnderTest, model: str) -> list[Pair]:
    """The pairs of a model to verify: those that are ready, and those that the route names, ascending.

    Raises:
        BundleError: the route is invalid.
        SplitserveError: the system does not serve the model.
    """
    route = source.route(model)
    ready = [pair for version in server.metadata(model).versions if (pair := parse_pair(model, version))]
    if pairs := sorted({*ready, *(route.named() if route else ())}):
        return pairs
    raise Unavailable(f'model "{model}" has no pair that is ready')


def verify(source: BundleSource, server: ServerUnderTest, model: str, pair: Pair) -> Outcome:
    """Send the golden rows of a pair in one request and compare the answer with the expected one."""
    outcome = Outcome(model, str(pair))
    try:
        promised = promise(source, model, pair)
        outcome = msgspec.structs.replace(outcome, promise=promised)
        answer = server.infer(model, {tensor.name: to_array(tensor) for tensor in promised.inputs}, version=str(pair))
        got = [from_array(name, array) for name, array in answer.items()]
    except BundleError as error:
        return msgspec.structs.replace(outcome, problem=str(error))
    except SplitserveError as error:
        return msgspec.structs.replace(outcome, problem=error.message)
    worst = goldens.worst_difference(promised.outputs, got, promised.tolerances)
    return msgspec.structs.replace(outcome, problem=str(worst or ""), worst=worst)
