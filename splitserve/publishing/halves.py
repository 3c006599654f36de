"""A bundle about to be written: fitted transforms or an ONNX model, tried out as a service would load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import onnx

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError
from splitserve.publishing import samples
from splitserve.publishing.compile import compile_transforms
from splitserve.publishing.errors import PublishError
from splitserve.repository import environment
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import Bundle
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import (
    COMPILED_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    PIPELINE_FILE,
    SCHEMA_VERSION,
    BundleError,
    Column,
    Kind,
    Manifest,
    Rows,
    Tolerance,
)
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.meaning import NO_MEANING, Meaning, meaning_of
from splitserve.runtimes.predictor import Predictor
from splitserve.runtimes.preprocessor import Preprocessor, to_dense
from splitserve.runtimes.rows import Rowset, UnsupportedRows, observe, to_tensors
from splitserve.runtimes.sklearn_pipeline import PICKLE_FILE
from splitserve.signature import BATCH, TensorSpec, check_inputs
from splitserve.tensors import Tensor
from splitserve.versions import MODEL_NAME

RTOL = 1e-4
MARGIN = 10
LEAST_ATOL = 1e-6
"""The tolerance of a floating-point output: ``RTOL``, and ``MARGIN`` times the largest difference that was seen where the bundle
was made, between rows computed one by one and together, and between what was computed and what crossed the wire; never less
than ``LEAST_ATOL``."""

N_FEATURE_NAMES = 10_000

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
    allow_pickle: bool = False,
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
        allow_pickle: write a pickle if skops cannot hold the transforms.
        manifest_fields: fields of the manifest that are passed on as they are.

    Raises:
        PublishError: the data does not fit, or the transforms do not survive being written, loaded or called over the wire.
    """
    meaning = meaning_of(transformer)
    learnt = {word for vocabulary in meaning.vocabularies for word in vocabulary}
    golden_rows = samples.take(data, samples.golden_rows(data, learnt))
    features = _transform(transformer, golden_rows)
    try:
        rows, inputs = observe(data, input_name)
    except UnsupportedRows as error:
        raise PublishError(str(error)) from error
    rows = _settle_missing(rows, transformer, data)
    output = _feature_spec(output_name, features, precision if all_as_floats or features.dtype.kind == "f" else None)
    manifest = _manifest(name, "preprocess", inputs, (output,), _PREPROCESS_PACKAGES, rows=rows, **manifest_fields)
    manifest = msgspec.structs.replace(
        manifest, fingerprint=meaning.fingerprint, feature_names=meaning.feature_names[:N_FEATURE_NAMES]
    )
    file_name, file = _written(transformer, allow_pickle)
    runtime = _load(manifest, file_name, file, trusted_modules)
    try:
        golden_inputs = to_tensors(rows, inputs, golden_rows)
        golden = Golden(golden_inputs, runtime.transform(golden_inputs))
    except SplitserveError as error:
        raise PublishError(f"X does not survive the wire: {error.message}") from error
    direct = from_array(output.name, features, output.datatype)
    manifest = _with_tolerances(manifest, golden, runtime.transform, direct)
    if worst := goldens.worst_difference((direct,), golden.outputs, {output.name: Tolerance(RTOL, LEAST_ATOL * MARGIN)}):
        raise PublishError(f"the transforms answer otherwise when they are loaded from disk: {worst}")
    model, compiled = compile_transforms(transformer, manifest, golden)
    manifest = msgspec.structs.replace(manifest, compiled=compiled)
    files = {file_name: file, GOLDEN_FILE: _encoded(golden), **({COMPILED_FILE: model} if model else {})}
    return PreprocessorHalf(manifest, files, golden, rows, runtime)


def passing_half(predictor: PredictorHalf, sample_inputs: Mapping[str, Array] | Array) -> PreprocessorHalf:
    """A preprocessor's bundle without transforms: what clients send goes on to the predictor as it is.

    Args:
        predictor: whose inputs become the model's.
        sample_inputs: as for `predictor_half`.
    """
    specs = predictor.manifest.inputs
    by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {specs[0].name: sample_inputs}
    rows = Rows("tensors")
    fields: dict[str, Any] = {"rows": rows, "labels": predictor.manifest.labels}
    manifest = _manifest(predictor.manifest.name, "preprocess", specs, specs, ("numpy", "splitserve"), **fields)
    runtime = Preprocessor(manifest, None)
    inputs = tuple(from_array(spec.name, np.asarray(by_name[spec.name]), spec.datatype) for spec in specs)
    golden = Golden(inputs, runtime.transform(inputs))
    return PreprocessorHalf(manifest, {GOLDEN_FILE: _encoded(golden)}, golden, rows, runtime)


def _transform(transformer: Any, rows: Rowset) -> Array:
    try:
        return to_dense(transformer.transform(rows))
    except Exception as error:  # a transform raises what it happens to
        raise PublishError(f"X does not fit the transforms: {error}") from error


def _written(transformer: Any, allow_pickle: bool) -> tuple[str, bytes]:
    """Name and contents of the file that holds the transforms."""
    try:
        data = sklearn_pipeline.dump(transformer)
        if allow_pickle:
            sklearn_pipeline.load(data, sklearn_pipeline.untrusted_modules(data))
        return PIPELINE_FILE, data
    except BundleError as error:
        if not allow_pickle:
            raise PublishError(f"{error}; allow_pickle=True writes a pickle, which services refuse by default") from error
    try:
        return PICKLE_FILE, sklearn_pipeline.dump_pickle(transformer)
    except BundleError as error:
        raise PublishError(str(error)) from error


def _load(manifest: Manifest, file_name: str, file: bytes, trusted_modules: Sequence[str]) -> Preprocessor:
    if file_name == PICKLE_FILE:
        return Preprocessor(manifest, sklearn_pipeline.load_pickle(file))
    try:
        return Preprocessor(manifest, sklearn_pipeline.load(file, trusted_modules))
    except BundleError as error:
        modules = sklearn_pipeline.untrusted_modules(file, trusted_modules)
        way_out = f"trusted_modules={modules}" if modules else "allow_pickle=True, and services that allow it too"
        raise PublishError(f"{error} (to publish: {way_out})") from error


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
    model: bytes,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    labels: Sequence[object],
    meaning: Meaning = NO_MEANING,
) -> PredictorHalf:
    """An ONNX model as a bundle.

    Args:
        model: the file's bytes.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input; `samples.N_GOLDEN_MAX` of them, spread
            evenly, become the golden samples.
        name: of the model.
        labels: class names in the order of its scores.
        meaning: of the features that it was trained on.

    Raises:
        PublishError: ONNX Runtime cannot run it, its leading dimensions are no batch, or the samples do not fit.
    """
    try:
        runtime = Predictor(model)
        _check_batched(runtime)
        by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {runtime.inputs[0].name: sample_inputs}
        arrays = {key: np.asarray(array) for key, array in by_name.items()}
        check_inputs(runtime.inputs, [from_array(key, array) for key, array in arrays.items()], widen=False)
        kept = samples.spread(len(next(iter(arrays.values()))), samples.N_GOLDEN_MAX)
        inputs = tuple(from_array(key, array[kept]) for key, array in arrays.items())
        golden = Golden(inputs, runtime.infer(inputs))
    except BundleError as error:
        raise PublishError(str(error)) from error
    except SplitserveError as error:
        raise PublishError(f"the sample inputs do not fit the model: {error.message}") from error
    if not kept:
        raise PublishError("the sample inputs have no rows; golden samples are taken from them")
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
        fingerprint=meaning.fingerprint,
        feature_names=meaning.feature_names[:N_FEATURE_NAMES],
    )
    manifest = _with_tolerances(manifest, golden, runtime.infer)
    return PredictorHalf(manifest, {MODEL_FILE: model, GOLDEN_FILE: _encoded(golden)}, runtime)


def _encoded(golden: Golden) -> bytes:
    try:
        return goldens.encode(golden)
    except BundleError as error:
        raise PublishError(f"the golden samples are too large: {error}") from error


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
        **fields,
    )


def _with_tolerances(manifest: Manifest, golden: Golden, run: Callable[[Any], Sequence[Tensor]], *others: Tensor) -> Manifest:
    """The manifest with the tolerances of its floating-point outputs."""
    alone = [output for sample in _single_samples(golden) for output in run(sample)]
    tolerances = {}
    for output in golden.outputs:
        array = to_array(output)
        if array.dtype.kind == "f":
            rows = [to_array(tensor) for tensor in alone if tensor.name == output.name]
            together = [np.concatenate(rows), *(to_array(other) for other in others if other.name == output.name)]
            seen = max(_largest_difference(array[: len(other)], other) for other in together)
            tolerances[output.name] = Tolerance(RTOL, max(MARGIN * seen, LEAST_ATOL))
    return msgspec.structs.replace(manifest, tolerances=tolerances)


def _single_samples(golden: Golden) -> list[tuple[Tensor, ...]]:
    """The first golden samples, each as a request of its own."""
    arrays = [(tensor, to_array(tensor)) for tensor in golden.inputs]
    n_rows = min(golden.inputs[0].n_rows, samples.N_GOLDEN)
    return [
        tuple(from_array(tensor.name, array[row : row + 1], tensor.datatype) for tensor, array in arrays) for row in range(n_rows)
    ]


def _largest_difference(one: Array, other: Array) -> float:
    with np.errstate(invalid="ignore"):
        differences = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.nan_to_num(differences, nan=0.0, posinf=0.0).max(initial=0.0))


def write(repository: Repository, *halves: PreprocessorHalf | PredictorHalf, version: int | None) -> list[Bundle]:
    """Write all bundles or none.

    Args:
        repository: where to.
        halves: what.
        version: of each; the next free number by default.

    Raises:
        PublishError: a version exists, or the repository cannot be written.
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
