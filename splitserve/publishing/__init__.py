"""Publishing: a fitted scikit-learn pipeline -> the two bundles that are served, checked against the pipeline first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
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

from splitserve import environment
from splitserve import golden as goldens
from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError
from splitserve.golden import Golden
from splitserve.manifest import (
    GOLDEN_FILE,
    MODEL_FILE,
    MODEL_NAME,
    PIPELINE_FILE,
    SCHEMA_VERSION,
    BundleError,
    Kind,
    Manifest,
    Postprocess,
    Tolerance,
)
from splitserve.publishing import samples
from splitserve.publishing.convert import LABEL, PREDICTION, PROBABILITIES, NotConvertible, to_onnx
from splitserve.repository import Bundle, BundleKey, Repository
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.predictor import Predictor
from splitserve.runtimes.preprocessor import Preprocessor, to_dense
from splitserve.runtimes.rows import Rowset, UnsupportedRows, observe, to_tensors
from splitserve.signature import BATCH, TensorSpec

INPUT_NAME = "features"
"""What a preprocessor's input is called if the data is one array, and what its output and a predictor's input are called."""

DEFAULT_TOLERANCE = 1e-4
"""How far the split may be from the original: absolute for probabilities, relative to the largest value for predictions.

ONNX models compute in float32 where scikit-learn uses float64: that alone makes a difference of up to about 1e-6.
"""

GOLDEN_TOLERANCE = Tolerance(rtol=1e-4, atol=1e-5)
"""What replaying floats on another machine may differ by."""

_PREPROCESS_PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "skops", "splitserve")
_PREDICT_PACKAGES = ("onnxruntime", "onnx", "skl2onnx", "numpy", "splitserve")


class PublishError(ValueError):
    """Nothing was published; the message says what is wrong and what to do."""


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
    expected = _expected(pipeline, checked)
    target = Repository(repository)

    refused: list[str] = []
    for precision in ("FP32", "FP64"):
        preprocessor = _Half.of_transformer(
            transformer, rows, name=name, input_name=input_name, output_name=INPUT_NAME, precision=precision,
            only_floats=True, trusted_modules=trusted_modules, refuses=_refuses(estimator),
        )  # fmt: skip
        try:
            model = to_onnx(estimator, _n_features(preprocessor), input_name=INPUT_NAME, precision=precision)
        except NotConvertible as error:
            refused.append(str(error))
            break
        features = {tensor.name: to_array(tensor) for tensor in preprocessor.golden.outputs}
        predictor = _Half.of_model(model.SerializeToString(), features, name=name, labels=_labels(estimator))
        worst, complaint = _compare(_answer(preprocessor, predictor, checked), expected, tolerance)
        if not complaint:
            bundles = _write(target, preprocessor, predictor, version=version)
            pair = f"{bundles[0].key.version}.{bundles[1].key.version}"
            return Published(name, pair, bundles[0].folder, bundles[1].folder, len(checked), worst)
        refused.append(f"at {precision}, {complaint}")
    raise PublishError("; ".join(refused))


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

    Raises:
        PublishError: not fitted, ``X`` does not fit, or the version exists. Nothing has been written then.
    """
    _check_fitted(transformer)
    half = _Half.of_transformer(
        transformer, _as_rows(X), name=name, input_name=input_name, output_name=output_name, precision=precision,
        trusted_modules=trusted_modules, labels=labels, postprocess=postprocess,
    )  # fmt: skip
    return _write(Repository(repository), half, version=version)[0]


def publish_predictor(
    model: bytes | str | os.PathLike[str] | onnx.ModelProto,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    labels: Sequence[object] = (),
) -> Bundle:
    """Publish an ONNX model, made by whatever means, as a predictor.

    Args:
        model: a path, the file's bytes or the loaded model. Its weights must be inside.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input; they become the golden samples.
        name: what clients call the model.
        repository: folder of the model repository.
        version: the next free number by default.
        labels: class names in the order of its scores.

    Raises:
        PublishError: ONNX Runtime can not run it, the samples do not fit, or the version exists. Nothing has been written then.
    """
    if isinstance(model, onnx.ModelProto):
        data = model.SerializeToString()
    else:
        data = model if isinstance(model, bytes) else _read(model)
    half = _Half.of_model(data, sample_inputs, name=name, labels=labels)
    return _write(Repository(repository), half, version=version)[0]


class _Half(msgspec.Struct):
    """One bundle about to be written: what its manifest will say, its files, and it loaded as a service would."""

    manifest: Manifest
    files: dict[str, bytes]
    golden: Golden
    runtime: Any

    @classmethod
    def of_transformer(
        cls, transformer: Any, rows: Rowset, *, name: str, input_name: str, output_name: str, precision: str,
        only_floats: bool = False, trusted_modules: Sequence[str], labels: Sequence[object] = (),
        postprocess: Postprocess | None = None, refuses: str = "",
    ) -> _Half:  # fmt: skip
        try:
            form, inputs = observe(rows, input_name)
            chosen = samples.take(rows, samples.golden_rows(rows))
            features = to_dense(transformer.transform(chosen))
        except UnsupportedRows as error:
            raise PublishError(str(error)) from error
        except Exception as error:  # a transform raises what it happens to
            raise PublishError(f"X does not fit the transforms: {error}") from error
        output = _feature_spec(output_name, features, precision, only_floats)
        data = sklearn_pipeline.dump(transformer)
        manifest = _manifest(
            name, "preprocess", inputs, (output,), _PREPROCESS_PACKAGES,
            rows=form, labels=tuple(map(str, labels)), postprocess=postprocess, refuses=refuses,
        )  # fmt: skip
        try:
            loaded = Preprocessor(manifest, sklearn_pipeline.load(data, trusted_modules))
            golden_inputs = to_tensors(form, inputs, chosen)
            golden = Golden(golden_inputs, loaded.transform(golden_inputs))
        except BundleError as error:
            own = sklearn_pipeline.untrusted_modules(data)
            raise PublishError(f"{error} (here: trusted_modules={own})") from error
        except SplitserveError as error:
            raise PublishError(f"X does not survive the wire: {error.message}") from error
        direct = from_array(output.name, features, output.datatype)
        if worst := goldens.worst_difference((direct,), golden.outputs, {output.name: GOLDEN_TOLERANCE}):
            raise PublishError(f"the transforms answer otherwise when loaded from disk: {worst}")
        return cls(manifest, {PIPELINE_FILE: data, GOLDEN_FILE: goldens.encode(golden)}, golden, loaded)

    @classmethod
    def of_model(cls, model: bytes, sample_inputs: Mapping[str, Array] | Array, *, name: str, labels: Sequence[object]) -> _Half:
        try:
            loaded = Predictor(model)
            _check_batched(loaded)
            by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {loaded.inputs[0].name: sample_inputs}
            inputs = tuple(from_array(key, np.asarray(array)) for key, array in by_name.items())
            golden = Golden(inputs, loaded.infer(inputs))
        except BundleError as error:
            raise PublishError(str(error)) from error
        except SplitserveError as error:
            raise PublishError(f"the sample inputs do not fit the model: {error.message}") from error
        opsets = onnx.load_from_string(model)
        made = {f"opset {entry.domain or 'ai.onnx'}": str(entry.version) for entry in opsets.opset_import}
        manifest = _manifest(
            name, "predict", loaded.inputs, loaded.outputs, _PREDICT_PACKAGES,
            labels=tuple(map(str, labels)), environment_extra={"ONNX IR": str(opsets.ir_version), **made},
        )  # fmt: skip
        return cls(manifest, {MODEL_FILE: model, GOLDEN_FILE: goldens.encode(golden)}, golden, loaded)


def _manifest(
    name: str, kind: Kind, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], packages: Sequence[str],
    *, environment_extra: Mapping[str, str] | None = None, **fields: Any,
) -> Manifest:  # fmt: skip
    if not MODEL_NAME.fullmatch(name):
        raise PublishError(f'name "{name}": expected letters, digits, ".", "_" and "-", a letter or digit first, at most 128')
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        kind=kind,
        version=0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={},
        inputs=inputs,
        outputs=outputs,
        environment={**environment.observe(packages), **(environment_extra or {})},
        tolerances={spec.name: GOLDEN_TOLERANCE for spec in outputs if spec.datatype.startswith(("FP", "BF"))},
        **fields,
    )


def _write(repository: Repository, *halves: _Half, version: int | None) -> list[Bundle]:
    """All halves or none."""
    written: list[Bundle] = []
    try:
        for half in halves:
            manifest = half.manifest
            number = version or repository.next_version(manifest.name, manifest.kind)
            written.append(repository.write(msgspec.structs.replace(manifest, version=number), half.files))
    except BundleError as error:
        for bundle in written:
            repository.remove(bundle.key)
        raise PublishError(str(error)) from error
    return written


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
        raise PublishError("X is a sparse matrix, which the protocol can not carry; publish with X.toarray()")
    else:
        try:
            rows = np.asarray(X)
        except ValueError as error:
            raise PublishError(f"X is not an array: {error}") from error
    if rows.ndim == 0 or len(rows) == 0:
        raise PublishError("X has no rows; golden samples are taken from it")
    return rows


def _feature_spec(name: str, features: Array, precision: str, only_floats: bool) -> TensorSpec:
    is_float = only_floats or features.dtype.kind == "f"
    datatype = precision if is_float else from_array(name, features[:0]).datatype
    return TensorSpec(name, datatype, (BATCH, *features.shape[1:]))


def _n_features(half: _Half) -> int:
    shape = half.manifest.outputs[0].shape
    if len(shape) != 2:
        raise PublishError(f"the transforms give {half.manifest.outputs[0]}; an estimator takes (n_rows, n_features)")
    return int(shape[1])


def _refuses(estimator: Any) -> str:
    """What scikit-learn would not have let the estimator take. Source: its ``check_array`` and estimator tags."""
    return "inf" if get_tags(estimator).input_tags.allow_nan else "nan"


def _labels(estimator: Any) -> list[str]:
    return [str(label) for label in getattr(estimator, "classes_", ())]


def _check_batched(predictor: Predictor) -> None:
    for spec in (*predictor.inputs, *predictor.outputs):
        if not spec.shape or spec.shape[0] != BATCH:
            raise BundleError(
                f'{MODEL_FILE}: "{spec.name}" has shape {list(spec.shape)}; the leading dimension must be a free batch'
            )


def _expected(pipeline: Pipeline, rows: Rowset) -> dict[str, Array]:
    """What the pipeline answers, by the names that the converted model uses."""
    try:
        predicted = np.asarray(pipeline.predict(rows))
        if hasattr(pipeline, "predict_proba"):
            return {LABEL: predicted, PROBABILITIES: np.asarray(pipeline.predict_proba(rows))}
    except Exception as error:  # a step raises what it happens to
        raise PublishError(f"X does not fit the pipeline: {error}") from error
    return {LABEL: predicted, PREDICTION: predicted}


def _answer(preprocessor: _Half, predictor: _Half, rows: Rowset) -> dict[str, Array]:
    """What the two halves, as a service loads them, answer to these rows."""
    manifest = preprocessor.manifest
    assert manifest.rows is not None, "of_transformer sets it"
    features = preprocessor.runtime.transform(to_tensors(manifest.rows, manifest.inputs, rows))
    return {tensor.name: to_array(tensor) for tensor in predictor.runtime.infer(features)}


def _compare(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> tuple[float, str]:
    """The largest difference between the split and the original, and a complaint if it is too large."""
    worst, scale = 0.0, 1.0
    for name in (PROBABILITIES, PREDICTION):
        if name in found:
            want = expected[name].reshape(found[name].shape)
            scale = 1.0 if name == PROBABILITIES else float(np.abs(want).max()) or 1.0
            difference = np.abs(found[name] - want) / scale
            worst = max(worst, float(difference.max()))
            if worst > tolerance:
                row = int(np.argmax(difference.reshape(len(difference), -1).max(axis=1)))
                return worst, f"{name} of row {row} differ by {worst:.1e}, more than {tolerance:.0e}: the pipeline gives " \
                              f"{want[row]}, the split {found[name][row]}"  # fmt: skip
    if LABEL in found:
        wrong = _wrong_labels(found[LABEL], expected, tolerance)
        if wrong is not None:
            return worst, f'label of row {wrong}: the pipeline gives "{expected[LABEL][wrong]}", the split ' \
                          f'"{_text(found[LABEL][wrong])}"'  # fmt: skip
    return worst, ""


def _wrong_labels(labels: Array, expected: Mapping[str, Array], tolerance: float) -> int | None:
    """The first row with another label, unless its best two probabilities are too close to tell apart."""
    for row, (have, want) in enumerate(zip(labels.tolist(), expected[LABEL].tolist(), strict=True)):
        if _text(have) != _text(want):
            ranked = np.sort(expected[PROBABILITIES][row])[-2:] if PROBABILITIES in expected else np.array([0.0, 1.0])
            if ranked[-1] - ranked[0] > 2 * tolerance:
                return row
    return None


def _text(label: object) -> str:
    return label.decode() if isinstance(label, bytes) else str(int(label) if isinstance(label, bool) else label)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PublishError(f"{os.fspath(path)}: {error.strerror}") from error


__all__ = [
    "BundleKey",
    "Postprocess",
    "PublishError",
    "Published",
    "publish",
    "publish_predictor",
    "publish_preprocessor",
]
