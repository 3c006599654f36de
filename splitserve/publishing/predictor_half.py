"""An ONNX model -> a predictor's bundle, tried out as a service would load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnx

from splitserve.arrays import Array, from_array
from splitserve.errors import SplitserveError
from splitserve.publishing import samples
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import (
    N_FEATURE_NAMES,
    PredictorHalf,
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


def predictor_half(
    model: bytes,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    labels: Sequence[object],
    output_labels: Mapping[str, Sequence[str]] | None = None,
    meaning: Meaning = NO_MEANING,
    rows: Sequence[Tensor] = (),
    is_row_wise: bool = True,
    probed: Mapping[str, Array] | None = None,
    source: GoldenRows = "own",
    origin: str = "",
) -> PredictorHalf:
    """An ONNX model as a bundle.

    Args:
        model: the file's bytes.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input; `samples.N_GOLDEN_MAX` of them, spread
            evenly, become the golden samples.
        name: of the model.
        labels: class names in the order of its scores.
        output_labels: of models with several targets, names of the columns of each output.
        meaning: of the features that it was trained on.
        rows: raw rows (n_samples, …) that ``sample_inputs`` were made from, if known.
        is_row_wise: prove that each answer depends on its own row alone; False: it need not, and requests are never merged.
        probed: arrays to prove that on, by input name; ``sample_inputs`` by default.
        source: where ``sample_inputs`` come from.
        origin: where the model comes from.

    Raises:
        PublishError: ONNX Runtime cannot run it, its leading dimensions are no batch, or the samples do not fit.
    """
    try:
        runtime = Predictor(model)
        _check_batched(runtime)
        by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {runtime.inputs[0].name: sample_inputs}
        arrays = {key: np.asarray(array) for key, array in by_name.items()}
        golden = _golden(runtime, arrays, rows)
    except BundleError as error:
        raise PublishError(str(error)) from error
    except SplitserveError as error:
        raise PublishError(f"the sample inputs do not fit the model: {error.message}") from error
    parsed = onnx.load_from_string(model)
    made_with = {f"opset {entry.domain or 'ai.onnx'}": str(entry.version) for entry in parsed.opset_import}
    manifest = new_manifest(
        name,
        "predict",
        runtime.inputs,
        runtime.outputs,
        _PREDICT_PACKAGES,
        {"ONNX IR": str(parsed.ir_version), **made_with},
        labels=tuple(map(str, labels)),
        output_labels={output: tuple(names) for output, names in (output_labels or {}).items()},
        fingerprint=meaning.fingerprint,
        feature_names=meaning.feature_names[:N_FEATURE_NAMES],
        is_row_wise=is_row_wise,
        golden=source,
        origin=origin,
        is_quantised=_is_quantised(parsed),
        trained_on=tuple(TensorSpec(tensor.name, tensor.datatype, (BATCH, *tensor.shape[1:])) for tensor in golden.rows),
    )
    bounds = goldens.bounds_of(manifest)
    if is_row_wise:
        more = tuple(from_array(key, np.asarray(array)) for key, array in (probed if probed is not None else arrays).items())
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
