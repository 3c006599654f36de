"""A loaded preprocessor: request tensors -> the tensors that a predictor takes, and its outputs -> the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from splitserve import environment, pairing
from splitserve import golden as goldens
from splitserve.arrays import DTYPES, Array, from_array
from splitserve.errors import InvalidInput
from splitserve.manifest import GOLDEN_FILE, BundleError, Manifest
from splitserve.repository import Bundle
from splitserve.runtimes import postprocess, sklearn_pipeline
from splitserve.runtimes.meaning import meaning_of
from splitserve.runtimes.rows import to_rows
from splitserve.signature import TensorSpec, check_inputs, check_outputs, empty
from splitserve.tensors import Tensor

_MESSAGE_LENGTH = 300


class Preprocessor:
    """Fitted transforms with what the manifest says of them. Knows no transport."""

    def __init__(self, manifest: Manifest, transformer: Any) -> None:
        if manifest.rows is None:
            raise BundleError('manifest.json: a preprocessor needs "rows"')
        self.manifest = manifest
        self.warnings: tuple[str, ...] = ()
        """What is not as it was where the bundle was made, and was allowed."""
        self._rows = manifest.rows
        self._transformer = transformer
        self._postprocess = manifest.postprocess
        self._labels = manifest.labels
        self._refuses = manifest.refuses
        self.inputs = manifest.inputs
        self.outputs = manifest.outputs

    def transform(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Request tensors (n_rows, …) -> the predictor's inputs (n_rows, …).

        Raises:
            InvalidInput: a tensor does not fit the signature, or the transforms refuse a value.
            PairMismatch: the transforms gave something else than the manifest promises.
        """
        check_inputs(self.inputs, inputs, widen=True)
        rows = to_rows(self._rows, self.inputs, inputs)
        n_rows = len(rows)
        if n_rows == 0:
            return tuple(empty(spec) for spec in self.outputs)
        try:
            features = self._transformer.transform(rows)
        except ValueError as error:
            raise InvalidInput(f"the transforms refuse a row: {_first_line(error)}") from error
        spec = self.outputs[0]
        with np.errstate(over="ignore"):  # what float32 can not hold becomes infinite, and is refused below if it must not be
            dense = to_dense(features).astype(DTYPES[spec.datatype], copy=False)
        self._check_values(dense)
        outputs = (from_array(spec.name, dense),)
        check_outputs(self.outputs, outputs, n_rows)
        return outputs

    def _check_values(self, features: Array) -> None:
        if self._refuses and features.dtype.kind == "f":
            bad = np.isinf(features) if self._refuses == "inf" else ~np.isfinite(features)
            if bad.any():
                row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
                what = "an infinite value" if self._refuses == "inf" else "a missing or infinite value"
                raise InvalidInput(f"row {row}: the transforms leave {what}, which the model does not take")

    def differences(self, predictor_inputs: Sequence[TensorSpec], predictor_outputs: Sequence[TensorSpec]) -> list[str]:
        """What keeps this from being paired with a predictor of that signature; empty when they fit."""
        return pairing.misfits(self.manifest, predictor_inputs, predictor_outputs)

    def sent(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of `transform` under the names that the predictor has for them."""
        return pairing.sent(self.manifest, outputs)

    def answer_specs(self, predictor_outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The signature of `answer` for a predictor with these outputs."""
        if self._postprocess is None:
            return tuple(predictor_outputs)
        return postprocess.output_specs(self._postprocess, predictor_outputs)

    def answer(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A predictor's outputs -> what the client gets."""
        if self._postprocess is None:
            return outputs
        return postprocess.apply(self._postprocess, self._labels, outputs)


def load(
    bundle: Bundle,
    *,
    trusted_modules: Sequence[str] = (),
    allow_environment_mismatch: bool = False,
    allow_unsafe_pickle: bool = False,
) -> Preprocessor:
    """Read, check and try a preprocessor's bundle.

    Raises:
        BundleError: a file is damaged, its environment is not this one's, its types are not allowed, it is a pickle and none is
            allowed, or its golden samples come out otherwise.
    """
    manifest = bundle.manifest
    warnings = _check_environment(manifest, allow_environment_mismatch)
    transformer = sklearn_pipeline.read(bundle, trusted_modules, allow_unsafe_pickle=allow_unsafe_pickle)
    _check_meaning(manifest, transformer)
    preprocessor = Preprocessor(manifest, transformer)
    preprocessor.warnings = warnings
    goldens.replay(bundle.read(GOLDEN_FILE), manifest, preprocessor.transform)
    return preprocessor


def _check_environment(manifest: Manifest, allow_mismatch: bool) -> tuple[str, ...]:
    """What of this environment differs and was allowed, or matters little.

    Raises:
        BundleError: it differs, and may not.
    """
    found = environment.mismatches("preprocess", manifest.environment)
    refused = [str(each) for each in found if each.is_required]
    if refused and not allow_mismatch:
        raise BundleError(
            f"{'; '.join(refused)}; serve it where the versions match, publish it again with those here, or set "
            "PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH=true and rely on the golden samples"
        )
    return tuple(f"{each}, allowed: relying on the golden samples" if each.is_required else str(each) for each in found)


def _check_meaning(manifest: Manifest, transformer: Any) -> None:
    """Raises:
    BundleError: the transforms' columns or vocabularies are not those that the manifest tells of.
    """
    found = meaning_of(transformer).fingerprint
    if manifest.fingerprint and found != manifest.fingerprint:
        raise BundleError(f"the features have the fingerprint {found}, manifest.json says {manifest.fingerprint}")


def to_dense(features: Any) -> Array:
    """A transform's result as a plain array: sparse matrices filled in, DataFrames without their labels."""
    if hasattr(features, "toarray"):
        features = features.toarray()
    return np.asarray(features)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:_MESSAGE_LENGTH]
