"""Publishing: a fitted scikit-learn pipeline -> the two bundles that are served, checked against the pipeline first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from splitserve.arrays import Array, to_array
from splitserve.publishing import samples
from splitserve.publishing.agreement import compare, expected_answer, split_answer
from splitserve.publishing.convert import NotConvertible, to_onnx
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import PreprocessorHalf, passing_half, predictor_half, preprocessor_half, write
from splitserve.repository.bundle import Bundle
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, Postprocess
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.meaning import NO_MEANING, meaning_of
from splitserve.runtimes.rows import Rowset

INPUT_NAME = "features"
"""What a preprocessor's input is called if the data is one array, and what its output and a predictor's input are called."""

DEFAULT_TOLERANCE = 1e-4
"""How far the split may be from the original: absolute for probabilities, relative to the largest value for predictions.

ONNX models compute in float32 where scikit-learn uses float64: that alone makes a difference of up to about 1e-6.
"""


class Published(msgspec.Struct, frozen=True):
    """What `publish` wrote. ``worst_difference`` is the largest one between the split and the original over the rows checked."""

    name: str
    pair: str
    preprocessor: Path
    predictor: Path
    n_checked: int
    worst_difference: float

    def __str__(self) -> str:
        return (
            f"{self.name} {self.pair}: {self.preprocessor} and {self.predictor}; on {self.n_checked} rows the split differs from "
            f"the original by at most {self.worst_difference:.1e}"
        )


def publish(
    pipeline: Pipeline,
    X: Any,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    input_name: str = INPUT_NAME,
    tolerance: float = DEFAULT_TOLERANCE,
    trusted_modules: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Published:
    """Split a fitted pipeline before its estimator and publish both halves.

    The estimator is converted to ONNX, at float32 or, if that is not close enough, at float64. Then the two halves, as a service
    would load them, are compared with the pipeline on ``X``.

    Args:
        pipeline: fitted; its last step is the estimator, the steps before it are the transforms.
        X: data of the kind that the pipeline was fitted on, (n_rows, …): a DataFrame or an array. Golden samples are taken from
            it, so it should show every category and, where clients may send them, missing values.
        name: what clients call the model.
        repository: folder of the model repository.
        version: of both halves; the next free number of each by default.
        input_name: what clients call the input if ``X`` is an array; a DataFrame's inputs are its columns.
        tolerance: how far probabilities (absolute) and predictions (relative to the largest) may be from the pipeline's.
        trusted_modules: modules of your own transformers; the service must be told to trust them too.
        allow_pickle: write the transforms as a pickle if skops cannot hold them; a service loads one only if it is told to,
            since that runs any code in it.

    Raises:
        PublishError: the pipeline is not fitted or not supported, ``X`` does not fit it, the split differs from it, or the
            version exists. Nothing has been written then.
    """
    if not isinstance(pipeline, Pipeline):
        raise PublishError(f"expected a scikit-learn Pipeline, got {type(pipeline).__name__}; publish_preprocessor and "
                           "publish_predictor take the halves")  # fmt: skip
    _check_fitted(pipeline)
    estimator = pipeline.steps[-1][1]
    if not hasattr(estimator, "predict"):
        raise PublishError(f"the last step, {type(estimator).__name__}, has no predict; publish_preprocessor takes transforms")
    transformer = pipeline[:-1] if len(pipeline.steps) > 1 else make_pipeline(FunctionTransformer()).fit(X)
    rows = _as_rows(X)
    checked = samples.take(rows, samples.spread(len(rows), samples.N_CHECKED))
    expected = expected_answer(pipeline, checked)

    complaints: list[str] = []
    for precision in ("FP32", "FP64"):
        preprocessor = preprocessor_half(
            transformer,
            rows,
            name=name,
            input_name=input_name,
            output_name=INPUT_NAME,
            precision=precision,
            all_as_floats=True,
            trusted_modules=trusted_modules,
            allow_pickle=allow_pickle,
            refuses=_refuses(estimator),
        )
        try:
            model = to_onnx(estimator, _n_features(preprocessor), input_name=INPUT_NAME, precision=precision)
        except NotConvertible as error:
            complaints.append(str(error))
            break
        features = {tensor.name: to_array(tensor) for tensor in preprocessor.golden.outputs}
        predictor = predictor_half(
            model.SerializeToString(), features, name=name, labels=_labels(estimator), meaning=meaning_of(transformer)
        )
        worst, complaint = compare(split_answer(preprocessor, predictor, checked), expected, tolerance)
        if not complaint:
            first, second = write(Repository(repository), preprocessor, predictor, version=version)
            pair = f"{first.key.version}.{second.key.version}"
            return Published(name, pair, first.folder, second.folder, len(checked), worst)
        complaints.append(f"at {precision}, {complaint}")
    raise PublishError("; ".join(complaints))


def publish_preprocessor(
    transformer: Any,
    X: Any,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    input_name: str = INPUT_NAME,
    output_name: str = INPUT_NAME,
    precision: str = "FP32",
    labels: Sequence[object] = (),
    postprocess: Postprocess | None = None,
    trusted_modules: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Bundle:
    """Publish fitted transforms as a preprocessor.

    Args:
        transformer: fitted; a Pipeline of transforms, a ColumnTransformer or a single one.
        X: as for `publish`.
        name: what clients call the model.
        repository: folder of the model repository.
        version: the next free number by default.
        input_name: what clients call the input if ``X`` is an array.
        output_name: what the predictor calls its input.
        precision: "FP32" or "FP64", what floating-point results are sent as; other results keep their datatype.
        labels: class names in the order of the predictor's scores, for the postprocess step.
        postprocess: how scores become probabilities and a label; without it the predictor's outputs are the answer.
        trusted_modules: modules of your own transformers; the service must be told to trust them too.
        allow_pickle: as for `publish`.

    Raises:
        PublishError: not fitted, ``X`` does not fit, or the version exists. Nothing has been written then.
    """
    _check_fitted(transformer)
    half = preprocessor_half(
        transformer,
        _as_rows(X),
        name=name,
        input_name=input_name,
        output_name=output_name,
        precision=precision,
        all_as_floats=False,
        trusted_modules=trusted_modules,
        allow_pickle=allow_pickle,
        labels=tuple(map(str, labels)),
        postprocess=postprocess,
    )
    return write(Repository(repository), half, version=version)[0]


def publish_predictor(
    model: bytes | str | os.PathLike[str] | onnx.ModelProto,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    labels: Sequence[object] = (),
    trained_on: Any = None,
) -> Bundle:
    """Publish an ONNX model, made by whatever means, as a predictor.

    Args:
        model: a path, the file's bytes or the loaded model. Its weights must be inside.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input; 64 of them, spread
            evenly, become the golden samples.
        name: what clients call the model.
        repository: folder of the model repository.
        version: the next free number by default.
        labels: class names in the order of its scores.
        trained_on: the fitted transforms whose results it was trained on; then it is paired only with preprocessors whose
            features mean the same.

    Raises:
        PublishError: ONNX Runtime cannot run it, the samples do not fit, or the version exists. Nothing has been written then.
    """
    meaning = NO_MEANING if trained_on is None else meaning_of(trained_on)
    half = predictor_half(_model_bytes(model), sample_inputs, name=name, labels=labels, meaning=meaning)
    return write(Repository(repository), half, version=version)[0]


def publish_onnx(
    model: bytes | str | os.PathLike[str] | onnx.ModelProto,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    labels: Sequence[object] = (),
) -> tuple[Bundle, Bundle]:
    """Publish an ONNX model that needs no transforms: the predictor, and a preprocessor that passes its inputs on as they are.

    Args:
        model: as for `publish_predictor`.
        sample_inputs: as for `publish_predictor`.
        name: what clients call the model.
        repository: folder of the model repository.
        version: of both halves; the next free number of each by default.
        labels: class names in the order of its scores.

    Raises:
        PublishError: as for `publish_predictor`. Nothing has been written then.
    """
    predictor = predictor_half(_model_bytes(model), sample_inputs, name=name, labels=labels)
    first, second = write(Repository(repository), passing_half(predictor, sample_inputs), predictor, version=version)
    return first, second


def _model_bytes(model: bytes | str | os.PathLike[str] | onnx.ModelProto) -> bytes:
    if isinstance(model, onnx.ModelProto):
        data: bytes = model.SerializeToString()
        return data
    return model if isinstance(model, bytes) else _read(model)


def refused_types(transformer: Any) -> list[str]:
    """Types and functions in fitted transforms that a service would not load, by name; it loads those whose modules it trusts.

    Args:
        transformer: fitted; a Pipeline of transforms, a ColumnTransformer or a single one.

    Raises:
        PublishError: skops, in whose form they are published, cannot hold them at all.
    """
    try:
        return sklearn_pipeline.untrusted_types(sklearn_pipeline.dump(transformer))
    except BundleError as error:
        raise PublishError(str(error)) from error


def _check_fitted(transformer: Any) -> None:
    try:
        check_is_fitted(transformer)
    except NotFittedError as error:
        raise PublishError(f"{type(transformer).__name__} is not fitted; call fit first") from error
    except TypeError as error:
        raise PublishError(f"expected a scikit-learn estimator, got {type(transformer).__name__}") from error


def _as_rows(X: Any) -> Rowset:
    """A DataFrame as it is, anything else as an array whose leading dimension is the rows."""
    if hasattr(X, "columns") and hasattr(X, "iloc"):
        rows = X
    elif hasattr(X, "toarray"):
        raise PublishError("X is a sparse matrix, which the protocol cannot carry; publish with X.toarray()")
    else:
        try:
            rows = np.asarray(X)
        except ValueError as error:
            raise PublishError(f"X is not an array: {error}") from error
    if rows.ndim == 0 or len(rows) == 0:
        raise PublishError("X has no rows; golden samples are taken from it")
    return rows


def _n_features(half: PreprocessorHalf) -> int:
    shape = half.manifest.outputs[0].shape
    if len(shape) != 2:
        raise PublishError(f"the transforms give {half.manifest.outputs[0]}; an estimator takes (n_rows, n_features)")
    return int(shape[1])


def _refuses(estimator: Any) -> str:
    """What scikit-learn would not have let the estimator take. Source: its ``check_array`` and estimator tags."""
    return "inf" if get_tags(estimator).input_tags.allow_nan else "nan"


def _labels(estimator: Any) -> list[str]:
    return [str(label) for label in getattr(estimator, "classes_", ())]


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PublishError(f"{os.fspath(path)}: {error.strerror}") from error


__all__ = [
    "Postprocess",
    "PublishError",
    "Published",
    "publish",
    "publish_onnx",
    "publish_predictor",
    "publish_preprocessor",
    "refused_types",
]
