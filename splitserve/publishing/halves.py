"""A bundle about to be written: fitted transforms or an ONNX model, tried out as a service would load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import onnx

from splitserve import environment
from splitserve import golden as goldens
from splitserve.arrays import Array, from_array
from splitserve.errors import SplitserveError
from splitserve.golden import Golden
from splitserve.manifest import (
    GOLDEN_FILE,
    MODEL_FILE,
    MODEL_NAME,
    PIPELINE_FILE,
    SCHEMA_VERSION,
    BundleError,
    Column,
    Kind,
    Manifest,
    Rows,
    Tolerance,
)
from splitserve.publishing import samples
from splitserve.publishing.errors import PublishError
from splitserve.repository import Bundle, Repository
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.predictor import Predictor
from splitserve.runtimes.preprocessor import Preprocessor, to_dense
from splitserve.runtimes.rows import Rowset, UnsupportedRows, observe, to_tensors
from splitserve.signature import BATCH, TensorSpec

GOLDEN_TOLERANCE = Tolerance(rtol=1e-4, atol=1e-5)
"""What replaying floats on another machine may differ by."""

_PREPROCESS_PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "pillow", "skops", "splitserve")
_PREDICT_PACKAGES = ("onnxruntime", "onnx", "skl2onnx", "numpy", "splitserve")


class PreprocessorHalf(msgspec.Struct, frozen=True):
    """A preprocessor's bundle: what its manifest will say, its files, its golden samples, and it loaded."""

    manifest: Manifest
    files: dict[str, bytes]
    golden: Golden
    rows: Rows
    runtime: Any


class PredictorHalf(msgspec.Struct, frozen=True):
    """A predictor's bundle: what its manifest will say, its files, and it loaded."""

    manifest: Manifest
    files: dict[str, bytes]
    runtime: Any


def preprocessor_half(
    transformer: Any,
    data: Rowset,
    *,
    name: str,
    input_name: str,
    output_name: str,
    precision: str,
    all_as_floats: bool,
    trusted_modules: Sequence[str],
    **manifest_fields: Any,
) -> PreprocessorHalf:
    """Fitted transforms as a bundle.

    Args:
        transformer: fitted.
        data: rows of the kind that it was fitted on.
        name: of the model.
        input_name: of the input if the data is one array.
        output_name: of the result.
        precision: "FP32" or "FP64", the datatype of results that are floating-point.
        all_as_floats: of all results.
        trusted_modules: modules besides the usual ones whose types may be in it.
        manifest_fields: fields of the manifest that are passed on as they are.

    Raises:
        PublishError: the data does not fit, or the transforms do not survive being written, loaded or called over the wire.
    """
    golden_rows = samples.take(data, samples.golden_rows(data))
    features = _transform(transformer, golden_rows)
    try:
        rows, inputs = observe(data, input_name)
    except UnsupportedRows as error:
        raise PublishError(str(error)) from error
    rows = _settle_missing(rows, transformer, data)
    output = _feature_spec(output_name, features, precision if all_as_floats or features.dtype.kind == "f" else None)
    manifest = _manifest(name, "preprocess", inputs, (output,), _PREPROCESS_PACKAGES, rows=rows, **manifest_fields)
    file = sklearn_pipeline.dump(transformer)
    runtime = _load(manifest, file, trusted_modules)
    try:
        golden_inputs = to_tensors(rows, inputs, golden_rows)
        golden = Golden(golden_inputs, runtime.transform(golden_inputs))
    except SplitserveError as error:
        raise PublishError(f"X does not survive the wire: {error.message}") from error
    direct = from_array(output.name, features, output.datatype)
    if worst := goldens.worst_difference((direct,), golden.outputs, {output.name: GOLDEN_TOLERANCE}):
        raise PublishError(f"the transforms answer otherwise when they are loaded from disk: {worst}")
    return PreprocessorHalf(manifest, {PIPELINE_FILE: file, GOLDEN_FILE: goldens.encode(golden)}, golden, rows, runtime)


def _transform(transformer: Any, rows: Rowset) -> Array:
    try:
        return to_dense(transformer.transform(rows))
    except Exception as error:  # a transform raises what it happens to
        raise PublishError(f"X does not fit the transforms: {error}") from error


def _load(manifest: Manifest, file: bytes, trusted_modules: Sequence[str]) -> Preprocessor:
    try:
        return Preprocessor(manifest, sklearn_pipeline.load(file, trusted_modules))
    except BundleError as error:
        modules = sklearn_pipeline.untrusted_modules(file)
        raise PublishError(f"{error} (to publish: trusted_modules={modules})") from error


def _settle_missing(rows: Rows, transformer: Any, data: Rowset) -> Rows:
    """Let an empty string stand for a missing value in text columns where the data shows none, if the transforms take one."""
    if rows.form == "array":
        return rows
    columns = tuple(
        msgspec.structs.replace(column, missing="nan") if _takes_missing(column, transformer, data) else column
        for column in rows.columns
    )
    return msgspec.structs.replace(rows, columns=columns)


def _takes_missing(column: Column, transformer: Any, data: Rowset) -> bool:
    is_text = data[column.name].dtype.kind not in "biuf"
    if not is_text or column.missing or "" in data[column.name].tolist():
        return False
    probe = data.iloc[:1].copy()
    probe[column.name] = probe[column.name].where([False])
    try:
        transformer.transform(probe)
    except Exception:  # whatever it raises, it does not take one
        return False
    return True


def predictor_half(
    model: bytes, sample_inputs: Mapping[str, Array] | Array, *, name: str, labels: Sequence[object]
) -> PredictorHalf:
    """An ONNX model as a bundle.

    Args:
        model: the file's bytes.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input.
        name: of the model.
        labels: class names in the order of its scores.

    Raises:
        PublishError: ONNX Runtime can not run it, its leading dimensions are no batch, or the samples do not fit.
    """
    try:
        runtime = Predictor(model)
        _check_batched(runtime)
        by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {runtime.inputs[0].name: sample_inputs}
        inputs = tuple(from_array(key, np.asarray(array)) for key, array in by_name.items())
        golden = Golden(inputs, runtime.infer(inputs))
    except BundleError as error:
        raise PublishError(str(error)) from error
    except SplitserveError as error:
        raise PublishError(f"the sample inputs do not fit the model: {error.message}") from error
    parsed = onnx.load_from_string(model)
    made_with = {f"opset {entry.domain or 'ai.onnx'}": str(entry.version) for entry in parsed.opset_import}
    manifest = _manifest(
        name,
        "predict",
        runtime.inputs,
        runtime.outputs,
        _PREDICT_PACKAGES,
        {"ONNX IR": str(parsed.ir_version), **made_with},
        labels=tuple(map(str, labels)),
    )
    return PredictorHalf(manifest, {MODEL_FILE: model, GOLDEN_FILE: goldens.encode(golden)}, runtime)


def _check_batched(predictor: Predictor) -> None:
    for spec in (*predictor.inputs, *predictor.outputs):
        if not spec.shape or spec.shape[0] != BATCH:
            raise BundleError(
                f'{MODEL_FILE}: "{spec.name}" has shape {list(spec.shape)}; the leading dimension must be a free batch'
            )


def _feature_spec(name: str, features: Array, datatype: str | None) -> TensorSpec:
    return TensorSpec(name, datatype or from_array(name, features[:0]).datatype, (BATCH, *features.shape[1:]))


def _manifest(
    name: str,
    kind: Kind,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    packages: Sequence[str],
    made_with: Mapping[str, str] | None = None,
    **fields: Any,
) -> Manifest:
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
        environment={**environment.observe(packages), **(made_with or {})},
        tolerances={spec.name: GOLDEN_TOLERANCE for spec in outputs if spec.datatype.startswith(("FP", "BF"))},
        **fields,
    )


def write(repository: Repository, *halves: PreprocessorHalf | PredictorHalf, version: int | None) -> list[Bundle]:
    """Write all bundles or none.

    Args:
        repository: where to.
        halves: what.
        version: of each; the next free number by default.

    Raises:
        PublishError: a version exists, or the repository can not be written.
    """
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
