"""A fitted scikit-learn estimator -> an ONNX model with outputs that can be compared with the estimator's."""

from __future__ import annotations

import warnings
from typing import Any

import onnx
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType

PROBABILITIES, LABEL, PREDICTION = "probabilities", "label", "prediction"

_INPUT_TYPES = {"FP32": FloatTensorType, "FP64": DoubleTensorType}


class NotConvertible(ValueError):
    """skl2onnx cannot convert this estimator, or not with these options."""


def to_onnx(estimator: Any, n_features: int, *, input_name: str, precision: str) -> onnx.ModelProto:
    """Convert an estimator.

    Args:
        estimator: fitted; takes (n_rows, n_features).
        n_features: columns of its input.
        input_name: name of the model's only input, (batch, n_features).
        precision: "FP32" or "FP64", the datatype of that input.

    Returns:
        A model with outputs ``label`` (batch,) and, if the estimator has ``predict_proba``, ``probabilities`` (batch, n_classes)
        for a classifier or clusterer; ``prediction`` (batch, n_targets) for a regressor.

    Raises:
        NotConvertible: with the estimator's class and skl2onnx's error.
    """
    initial_types = [(input_name, _INPUT_TYPES[precision]([None, n_features]))]
    has_zipmap = hasattr(estimator, "predict_proba")
    options = {id(estimator): {"zipmap": False}} if has_zipmap else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = convert_sklearn(estimator, initial_types=initial_types, options=options)
    except Exception as error:  # skl2onnx's converters may raise anything
        reason = " ".join(str(error).split())[:300]
        raise NotConvertible(
            f"{type(estimator).__name__} cannot be converted to ONNX at {precision}: {reason}; convert it by other means and "
            "publish the result with publish_predictor"
        ) from error
    return _tidy(model, estimator)


def _tidy(model: onnx.ModelProto, estimator: Any) -> onnx.ModelProto:
    """Keep and rename the outputs that have a counterpart in scikit-learn."""
    names = [output.name for output in model.graph.output]
    if "label" in names:
        kept = {"label": LABEL}
        if hasattr(estimator, "predict_proba") and "probabilities" in names:
            kept["probabilities"] = PROBABILITIES
    elif len(names) == 1:
        kept = {names[0]: PREDICTION}
    else:
        raise NotConvertible(f"{type(estimator).__name__}: skl2onnx gives outputs {', '.join(names)}, expected one or a label")
    wanted = [output for output in model.graph.output if output.name in kept]
    del model.graph.output[:]
    model.graph.output.extend(wanted)
    for old, new in kept.items():
        _rename(model.graph, old, new)
    return model


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.output[:] = [new if name == old else name for name in node.output]
        node.input[:] = [new if name == old else name for name in node.input]
    for output in graph.output:
        output.name = new if output.name == old else output.name
