"""Fitted transforms -> a preprocessor's bundle, tried out as a service would load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd

from splitserve.arrays import Array, from_array
from splitserve.errors import SplitserveError
from splitserve.publishing import columns, samples
from splitserve.publishing.compile import compile_transforms
from splitserve.publishing.convert import NO_NAMES, Names
from splitserve.publishing.errors import PublishError
from splitserve.publishing.golden_rows import choose
from splitserve.publishing.halves import (
    N_FEATURE_NAMES,
    N_PROBED,
    PredictorHalf,
    PreprocessorHalf,
    PublishOptions,
    check_row_wise,
    encode_golden,
    new_manifest,
    settled,
)
from splitserve.publishing.portable import NotPortable, portable_plan
from splitserve.publishing.proof import tolerances_of
from splitserve.publishing.training_data import INPUT_NAME, misfit
from splitserve.repository import golden as goldens
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import (
    COMPILED_FILE,
    GOLDEN_FILE,
    PIPELINE_FILE,
    BundleError,
    Column,
    Manifest,
    Postprocess,
    Rows,
)
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.meaning import meaning_of, parts
from splitserve.runtimes.preprocessor import Preprocessor, to_dense
from splitserve.runtimes.rows import Missing, Rowset, UnsupportedRows, observe, to_tensors
from splitserve.runtimes.sklearn_pipeline import PICKLE_FILE
from splitserve.signature import BATCH, TensorSpec
from splitserve.tensors import Tensor

_PREPROCESS_PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "pillow", "skops", "splitserve")


class FeatureForm(msgspec.Struct, frozen=True, kw_only=True):
    """What a predictor takes from a preprocessor: the ``name`` of its input and the ``precision`` of floating-point features,
    "FP32" or "FP64", to which all are converted if ``all_as_floats``. It does not accept the values that it ``refuses``: "nan"
    (NaN and infinity), "inf" or "" (neither).
    """

    name: str = INPUT_NAME
    precision: str
    all_as_floats: bool
    refuses: Literal["", "inf", "nan"] = ""


def preprocessor_half(
    transformer: Any,
    data: Rowset,
    features: FeatureForm,
    options: PublishOptions,
    *,
    names: Names = NO_NAMES,
    postprocess: Postprocess | None = None,
) -> PreprocessorHalf:
    """Fitted transforms as a bundle.

    Args:
        transformer: fitted.
        data: rows of the kind that it was fitted on.
        features: what the predictor takes.
        options: of the publication.
        names: of the predictor's classes or targets.
        postprocess: how the predictor's scores become probabilities and a label.

    Raises:
        PublishError: the data does not fit, or the transforms cannot be written, loaded or called with wire tensors.
    """
    meaning = meaning_of(transformer)
    learnt = {word for vocabulary in meaning.vocabularies for word in vocabulary}
    data, unused = columns.without_unused(transformer, data)
    try:
        rows, inputs = observe(data, options.input_name)
    except UnsupportedRows as error:
        raise PublishError(str(error)) from error
    rows, inputs, floats = columns.with_floats(
        transformer, data, rows, inputs, refuses=features.refuses, all_as_floats=features.all_as_floats
    )
    chosen = choose(options.golden, data, rows, learnt)
    golden_rows, source = chosen.rows, chosen.source
    given = _transform(transformer, golden_rows, "X" if source == "rows" else "golden")
    rows = _settle_missing(rows, transformer, data)
    _check_empty_text(rows, transformer, data)
    output = _feature_spec(features, given)
    manifest = new_manifest(
        options.name,
        "preprocess",
        inputs,
        (output,),
        _PREPROCESS_PACKAGES,
        rows=rows,
        golden=source,
        ignored=unused,
        columns=_column_names(transformer, data),
        fingerprint=meaning.fingerprint,
        feature_names=meaning.feature_names[:N_FEATURE_NAMES],
        refuses=features.refuses,
        labels=names.labels,
        output_labels=names.output_labels,
        postprocess=postprocess,
        is_row_wise=options.row_wise,
        origin=options.origin,
    )
    file_name, file = _written(transformer, options.allow_pickle)
    runtime = _load(manifest, file_name, file, options.trusted_modules)
    try:
        golden_inputs = to_tensors(rows, inputs, golden_rows)
        runtime.transform(golden_inputs)  # raises what is wrong
        manifest, plan_files, runtime = _portable(manifest, runtime, golden_inputs, data)
        proof = Golden(golden_inputs, runtime.transform(golden_inputs))
    except SplitserveError as error:
        raise PublishError(f"X does not survive the wire: {error.message}") from error
    direct = from_array(output.name, given, output.datatype)
    if worst := goldens.worst_difference((direct,), proof.outputs, tolerances_of(proof.outputs)):
        raise PublishError(f"the transforms answer differently when they are loaded from disk: {worst}")
    if manifest.is_row_wise:
        probed = samples.take(data, samples.spread(len(data), N_PROBED))
        check_row_wise(runtime.transform, to_tensors(rows, inputs, probed))
    proof, tolerances = settled(runtime.transform, proof)
    manifest = msgspec.structs.replace(manifest, tolerances=tolerances)
    model, compiled = compile_transforms(transformer, manifest, proof)
    manifest = msgspec.structs.replace(manifest, compiled=compiled)
    files = {file_name: file, **plan_files, GOLDEN_FILE: encode_golden(proof), **({COMPILED_FILE: model} if model else {})}
    return PreprocessorHalf(manifest, files, proof, rows, runtime, columns.said(unused, floats, rows))


def _portable(
    manifest: Manifest, runtime: Preprocessor, golden_inputs: Sequence[Tensor], data: Rowset
) -> tuple[Manifest, dict[str, bytes], Preprocessor]:
    """The manifest that says whether the bundle is portable, the files of its plan, and what runs it, as a service would."""
    if manifest.rows is None:
        return manifest, {}, runtime
    rows = to_tensors(manifest.rows, manifest.inputs, samples.take(data, samples.spread(len(data), _N_COMPARED)))
    try:
        files, plan = portable_plan(runtime.transformer, manifest, golden_inputs, rows)
    except NotPortable as error:
        return msgspec.structs.replace(manifest, portable=False, not_portable=" ".join(str(error).split())[:500]), {}, runtime
    manifest = msgspec.structs.replace(manifest, portable=True)
    return manifest, files, Preprocessor(manifest, None, plan=plan)


_N_COMPARED = 2000
"""Rows of the training data from which those are made that a plan is compared on."""


def _column_names(transformer: Any, data: Any) -> tuple[str, ...]:
    """The names of an array's columns, if the transforms were fitted on a frame that had them."""
    names = tuple(map(str, getattr(transformer, "feature_names_in_", ())))
    return names if not hasattr(data, "columns") and data.ndim == 2 and len(names) == data.shape[1] else ()


def passing_half(predictor: PredictorHalf, sample_inputs: Mapping[str, Array] | Array) -> PreprocessorHalf:
    """A preprocessor's bundle without transforms: inputs are passed to the predictor unchanged.

    Args:
        predictor: its inputs become the model's.
        sample_inputs: as for `publish_predictor`.
    """
    specs = predictor.manifest.inputs
    by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {specs[0].name: sample_inputs}
    rows = Rows("tensors")
    fields: dict[str, Any] = {
        "rows": rows,
        "labels": predictor.manifest.labels,
        "is_row_wise": predictor.manifest.is_row_wise,
        "golden": predictor.manifest.golden,
        "tolerances": {},
        "portable": True,
    }
    manifest = new_manifest(predictor.manifest.name, "preprocess", specs, specs, ("numpy", "splitserve"), **fields)
    runtime = Preprocessor(manifest, None)
    inputs = tuple(from_array(spec.name, np.asarray(by_name[spec.name]), spec.datatype) for spec in specs)
    golden = Golden(inputs, runtime.transform(inputs))
    return PreprocessorHalf(manifest, {GOLDEN_FILE: encode_golden(golden)}, golden, rows, runtime)


def _transform(transformer: Any, rows: Rowset, name: str) -> Array:
    try:
        features = to_dense(transformer.transform(rows))
    except Exception as error:  # a transform may raise anything
        raise PublishError(misfit(transformer, rows, str(error), name)) from error
    if len(features) != len(rows) > 1:  # of one row, scikit-learn's SparsePCA loses the dimension of rows
        raise PublishError(misfit(transformer, rows, f"they give {len(features)} rows for {len(rows)}", name))
    return features


def _written(transformer: Any, allow_pickle: bool) -> tuple[str, bytes]:
    """Name and contents of the transforms' file."""
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
        raise PublishError(
            f"{error}; skops cannot hold them either. A lambda, or a function inside of another, has no name to load it by: "
            "define it in a module of its own"
        ) from error


def _load(manifest: Manifest, file_name: str, file: bytes, trusted_modules: Sequence[str]) -> Preprocessor:
    if file_name == PICKLE_FILE:
        return Preprocessor(manifest, sklearn_pipeline.load_pickle(file))
    try:
        return Preprocessor(manifest, sklearn_pipeline.load(file, trusted_modules))
    except BundleError as error:
        if reason := _not_loadable(sklearn_pipeline.untrusted_types(file)):
            raise PublishError(reason) from error
        modules = sklearn_pipeline.untrusted_modules(file, trusted_modules)
        way_out = f"trusted_modules={modules}" if modules else "allow_pickle=True, and services that allow it too"
        raise PublishError(f"{error} (to publish: {way_out})") from error


def _not_loadable(names: Sequence[str]) -> str:
    """What to do about functions, classes and objects that no service can load, trusted or not; "" if there are none."""
    for name in names:
        if name.endswith(".NAType"):
            return (
                "the transforms hold pandas.NA, which skops cannot load again; fit them on columns of dtype object, in which a "
                'missing value is NaN: X["COLUMN"].astype(object).where(X["COLUMN"].notna(), np.nan)'
            )
        if "<" in name:
            return (
                f"the transforms hold {name}: a lambda, or a function inside of another, has no name to load it by; take a "
                "function of numpy such as np.log1p, or one of a module of yours that is named in trusted_modules, and fit again"
            )
        if name.startswith("__main__."):
            return (
                f"the transforms hold {name}, which is defined in the script or notebook that publishes and which a service does "
                "not have; move it to a module of its own, import it, fit again, and name that module in trusted_modules"
            )
    return ""


def _settle_missing(rows: Rows, transformer: Any, data: Rowset) -> Rows:
    """Make "" the missing value of text columns without one in the data, if the transforms accept a missing value."""
    if rows.form == "array" and rows.element != "str":
        return rows
    settled_columns = tuple(
        msgspec.structs.replace(column, missing=_missing_of(column, rows, transformer, data)) for column in rows.columns
    )
    return msgspec.structs.replace(rows, columns=settled_columns)


def _missing_of(column: Column, rows: Rows, transformer: Any, data: Rowset) -> Missing:
    """The missing value that "" on the wire becomes: that of the data, else one that the transforms accept, else none.

    Of NaN and None, it is the one that the imputers replace.
    """
    values = data[column.name] if rows.form == "frame" else np.asarray(data).ravel()
    if values.dtype.kind in "biufM" or column.missing or "" in values.tolist() or column.dtype.startswith("category["):
        return column.missing
    ranked: tuple[Missing, ...] = ("none", "nan") if _replaces_none(transformer) else ("nan", "none")
    if rows.form == "frame" and column.dtype != "object":  # pandas' own types of text have one missing value
        ranked = ("nan",)
    return next((missing for missing in ranked if _accepts(missing, column, rows, transformer, data)), "")


def _check_empty_text(rows: Rows, transformer: Any, data: Rowset) -> None:
    """Refuse columns of text with both empty and missing values, if the transforms tell them apart: on the wire they are one.

    Raises:
        PublishError: there is one; names it and the way out.
    """
    for column in rows.columns:
        given = data[column.name] if rows.form == "frame" else np.asarray(data)
        if column.missing or given.dtype.kind in "biufM" or column.dtype.startswith("category["):
            continue
        values = np.asarray(given, dtype=object).reshape(len(data), -1)
        chosen = np.flatnonzero(pd.isna(values).any(axis=1))[:N_PROBED].tolist()
        if not chosen or "" not in values.ravel().tolist():
            continue
        probe = samples.take(data, chosen)
        filled = probe.copy()
        if rows.form == "frame":
            filled[column.name] = filled[column.name].fillna("")
        else:
            filled[pd.isna(filled)] = ""
        if not columns.same(transformer, probe, filled):
            name = f'X["{column.name}"]' if rows.form == "frame" else "X"
            raise PublishError(
                f'"{column.name}": has both missing and empty text, which are the same on the wire and which the transforms tell '
                f'apart; fit again with one of them, e.g. after {name} = {name}.fillna("")'
            )


def _replaces_none(transformer: Any) -> bool:
    return getattr(transformer, "missing_values", "") is None or any(map(_replaces_none, parts(transformer)))


def _accepts(missing: Missing, column: Column, rows: Rows, transformer: Any, data: Rowset) -> bool:
    value = None if missing == "none" else np.nan
    probe = data[:1].copy()
    if rows.form == "frame":
        text = probe[column.name]
        is_plain = column.dtype == "object"
        probe[column.name] = pd.Series([value], index=probe.index, dtype=object) if is_plain else text.where([False])
    else:
        probe = probe.astype(object)
        probe[...] = value
    try:
        transformer.transform(probe)
    except Exception:  # it rejects a missing value, with whatever error
        return False
    return True


def _feature_spec(features: FeatureForm, given: Array) -> TensorSpec:
    is_float = features.all_as_floats or given.dtype.kind == "f"
    datatype = features.precision if is_float else from_array(features.name, given[:0]).datatype
    return TensorSpec(features.name, datatype, (BATCH, *given.shape[1:]))
