"""A loaded preprocessor: request tensors -> the tensors that a predictor takes, and its outputs -> the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from splitserve import golden as goldens
from splitserve.arrays import DTYPES, Array, from_array
from splitserve.environment import check_sklearn
from splitserve.errors import InvalidInput, PairMismatch
from splitserve.manifest import GOLDEN_FILE, PIPELINE_FILE, BundleError, Manifest
from splitserve.repository import Bundle
from splitserve.runtimes import postprocess, sklearn_pipeline
from splitserve.runtimes.rows import to_rows
from splitserve.signature import TensorSpec, check_inputs, check_outputs, empty, fits
from splitserve.tensors import Tensor

_MESSAGE_LENGTH = 300


class Preprocessor:
    """Fitted transforms with what the manifest says of them. Knows no transport."""

    def __init__(self, manifest: Manifest, transformer: Any) -> None:
        if manifest.rows is None:
            raise BundleError('manifest.json: a preprocessor needs "rows"')
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
        found = fits(self.outputs, predictor_inputs)
        if self._postprocess is not None:
            found += postprocess.differences(self._postprocess, self._labels, predictor_outputs)
        return found

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


def load(bundle: Bundle, *, trusted_modules: Sequence[str] = (), allow_environment_mismatch: bool = False) -> Preprocessor:
    """Read, check and try a preprocessor's bundle.

    Raises:
        BundleError: a file is damaged, its environment is not this one's, its types are not allowed, or its golden samples
            come out otherwise.
    """
    manifest = bundle.manifest
    if not allow_environment_mismatch:
        check_sklearn(manifest.environment)
    try:
        preprocessor = Preprocessor(manifest, sklearn_pipeline.load(bundle.read(PIPELINE_FILE), trusted_modules))
        golden = goldens.decode(bundle.read(GOLDEN_FILE), manifest.inputs, manifest.outputs)
        found = preprocessor.transform(golden.inputs)
    except (InvalidInput, PairMismatch) as error:
        raise BundleError(f"golden samples: {error.message}") from error
    if worst := goldens.worst_difference(golden.outputs, found, manifest.tolerances):
        raise BundleError(str(worst))
    return preprocessor


def to_dense(features: Any) -> Array:
    """A transform's result as a plain array: sparse matrices filled in, DataFrames without their labels."""
    if hasattr(features, "toarray"):
        features = features.toarray()
    return np.asarray(features)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:_MESSAGE_LENGTH]
