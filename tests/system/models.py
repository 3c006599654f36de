"""ONNX models made by hand, for tests."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


def _model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], n_inputs: int, n_outputs: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", n_inputs])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", n_outputs])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def softmax_model(n_features: int, n_labels: int = 2) -> bytes:
    """``scores`` (batch, n_labels): a softmax over a fixed linear map of ``features`` (batch, n_features)."""
    weights = np.random.default_rng(0).normal(size=(n_features, n_labels)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    return _model(nodes, [numpy_helper.from_array(weights, "weights")], n_features, n_labels)


def slow_model(n_features: int, n_rounds: int) -> bytes:
    """``scores`` (batch, n_features): ``features`` after ``n_rounds`` of a loop that takes a while."""
    size = 256
    matrix = (np.eye(size) * 0.5).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "matrix"], ["next_state"]),
            helper.make_node("Identity", ["going"], ["still_going"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [size, size]),
        ],
    )
    # A row of anything but zeros takes all rounds, so that golden samples of zeros are quick.
    nodes = [
        helper.make_node("ReduceMax", ["features"], ["largest"], keepdims=0),
        helper.make_node("Clip", ["largest", "zero", "one"], ["share"]),
        helper.make_node("Mul", ["share", "rounds_as_float"], ["share_of_rounds"]),
        helper.make_node("Cast", ["share_of_rounds"], ["rounds"], to=TensorProto.INT64),
        helper.make_node("Loop", ["rounds", "yes", "matrix"], ["end"], body=body),
        helper.make_node("ReduceMin", ["end"], ["least"], keepdims=0),
        helper.make_node("Mul", ["least", "zero"], ["nothing"]),
        helper.make_node("Add", ["features", "nothing"], ["scores"]),
    ]
    initializers = [
        numpy_helper.from_array(matrix, "matrix"),
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(n_rounds, np.float32), "rounds_as_float"),
    ]
    return _model(nodes, initializers, n_features, n_features)


def affine_model(n_features: int, scale: float, offset: float, *, n_ballast: int = 0) -> bytes:
    """``scores`` (batch, n_features): ``features * scale + offset``. ``n_ballast`` floats of weights make it large."""
    ballast = np.zeros(max(n_ballast, 1), np.float32)
    nodes = [
        helper.make_node("Mul", ["features", "scale"], ["scaled"]),
        helper.make_node("ReduceMax", ["ballast"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["scaled", "offset"], ["shifted"]),
        helper.make_node("Add", ["shifted", "nothing"], ["scores"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array(offset, np.float32), "offset"),
        numpy_helper.from_array(ballast, "ballast"),
    ]
    return _model(nodes, initializers, n_features, n_features)
