"""An ONNX model -> a predictor's bundle, tried out as a service would load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnx

from splitserve.arrays import Array, from_array
from splitserve.errors import SplitserveError
from splitserve.publishing import samples
from splitserve.publishing.convert import NO_NAMES, Names
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import (
    N_FEATURE_NAMES,
    PredictorHalf,
    PublishOptions,
    check_row_wise,
    encode_golden,
    new_manifest,
    settled,
    take_rows,
)
from splitserve.repository import golden as goldens
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import GOLDEN_FILE, MODEL_FILE, BundleError, GoldenRows
from splitserve.runtimes.meaning import NO_MEANING, Meaning
from splitserve.runtimes.predictor import Predictor
from splitserve.signature import BATCH, TensorSpec, check_inputs
from splitserve.tensors import Tensor

_PREDICT_PACKAGES = ("onnxruntime", "onnx", "skl2onnx", "numpy", "splitserve")


class ModelSamples(msgspec.Struct, frozen=True):
    """What a model is tried on: ``inputs`` are arrays (n_samples, …) by input name, or the array of the only input.

    `samples.N_GOLDEN_MAX` of them, spread evenly, become the golden samples. ``rows`` are the raw rows (n_samples, …) that they
    were made from, if known, ``source`` is where these come from. That each answer depends on its own row alone is proven on
    ``probed``, ``inputs`` by default.
    """

    inputs: Mapping[str, Array] | Array
    rows: Sequence[Tensor] = ()
    source: GoldenRows = "own"
    probed: Mapping[str, Array] | None = None


def predictor_half(
    model: bytes, tried: ModelSamples, options: PublishOptions, *, names: Names = NO_NAMES, meaning: Meaning = NO_MEANING
) -> PredictorHalf:
    """An ONNX model as a bundle.

    Args:
        model: the file's bytes.
        tried: what it is tried on.
        options: of the publication.
        names: of its classes or targets.
        meaning: of the features that it was trained on.

    Raises:
        PublishError: ONNX Runtime cannot run it, its leading dimensions are no batch, or the samples do not fit.
    """
    try:
        runtime = Predictor(model)
        _check_batched(runtime)
        by_name = tried.inputs if isinstance(tried.inputs, Mapping) else {runtime.inputs[0].name: tried.inputs}
        arrays = {key: np.asarray(array) for key, array in by_name.items()}
        golden = _golden(runtime, arrays, tried.rows)
    except BundleError as error:
        raise PublishError(str(error)) from error
    except SplitserveError as error:
        raise PublishError(f"the sample inputs do not fit the model: {error.message}") from error
    parsed = onnx.load_from_string(model)
    made_with = {f"opset {entry.domain or 'ai.onnx'}": str(entry.version) for entry in parsed.opset_import}
    manifest = new_manifest(
        options.name,
        "predict",
        runtime.inputs,
        runtime.outputs,
        _PREDICT_PACKAGES,
        {"ONNX IR": str(parsed.ir_version), **made_with},
        labels=names.labels,
        output_labels=names.output_labels,
        fingerprint=meaning.fingerprint,
        feature_names=meaning.feature_names[:N_FEATURE_NAMES],
        is_row_wise=options.row_wise,
        golden=tried.source,
        origin=options.origin,
        is_quantised=_is_quantised(parsed),
        trained_on=tuple(TensorSpec(tensor.name, tensor.datatype, (BATCH, *tensor.shape[1:])) for tensor in golden.rows),
    )
    bounds = goldens.bounds_of(manifest)
    if options.row_wise:
        probed = arrays if tried.probed is None else tried.probed
        more = tuple(from_array(key, np.asarray(array)) for key, array in probed.items())
        check_row_wise(runtime.infer, more, bounds)
    golden, tolerances = settled(runtime.infer, golden, bounds)
    manifest = msgspec.structs.replace(manifest, tolerances=tolerances)
    return PredictorHalf(manifest, {MODEL_FILE: model, GOLDEN_FILE: encode_golden(golden)}, runtime, golden)


def _golden(runtime: Predictor, arrays: Mapping[str, Array], rows: Sequence[Tensor]) -> Golden:
    """At most `samples.N_GOLDEN_MAX` of the sample inputs, spread evenly, with their outputs and raw rows.

    Raises:
        SplitserveError: the arrays do not fit the model.
        PublishError: there are no rows, or the raw rows are not as many.
    """
    check_inputs(runtime.inputs, [from_array(key, array) for key, array in arrays.items()], widen=False)
    n_rows = len(next(iter(arrays.values())))
    kept = samples.spread(n_rows, samples.N_GOLDEN_MAX)
    inputs = tuple(from_array(key, array[kept]) for key, array in arrays.items())
    if rows and rows[0].n_rows != n_rows:
        raise PublishError(f"rows: expected the {n_rows} that the sample inputs were made from, got {rows[0].n_rows}")
    golden = Golden(inputs, runtime.infer(inputs), take_rows(rows, kept) if rows else ())
    if not kept:
        raise PublishError("the sample inputs have no rows; golden samples are taken from them")
    return golden


def _is_quantised(model: onnx.ModelProto) -> bool:
    """Whether it computes with 8 bit integers. Source: ONNX operators, QLinear…, …Integer, Quantize…, Dequantize…."""
    return any(
        node.op_type.startswith(("QLinear", "Quantize", "Dequantize", "DynamicQuantize")) or node.op_type.endswith("Integer")
        for node in model.graph.node
    )


def _check_batched(predictor: Predictor) -> None:
    for spec in (*predictor.inputs, *predictor.outputs):
        if not spec.shape or spec.shape[0] != BATCH:
            raise BundleError(
                f'{MODEL_FILE}: "{spec.name}" has shape {list(spec.shape)}; the leading dimension must be a free batch'
            )
