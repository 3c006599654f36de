"""The images example's build compares the exported network with PyTorch: networks that an exporter could have written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitserve.pipeline.context import Context, StepFailed
from splitserve.pipeline.templates.images.build import check

N_CLASSES = 3
PIXELS = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, N_CLASSES)).astype(np.float32)
BIAS = np.array([0.5, -0.5, 0.0], np.float32)
CONTEXT: Any = SimpleNamespace(fail_unless=lambda holds, message: Context.fail_unless(CONTEXT, holds, message))


def network(bias: np.ndarray = BIAS, *, is_of_batch: bool = False) -> bytes:
    """``logits``: a linear map of ``pixels``, with the mean of the batch taken off if it is as in training."""
    nodes = [helper.make_node("MatMul", ["pixels", "weights"], ["product"])]
    if is_of_batch:
        nodes += [
            helper.make_node("ReduceMean", ["product"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["product", "mean"], ["scores"]),
        ]
    nodes.append(helper.make_node("Add", ["scores" if is_of_batch else "product", "bias"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", N_CLASSES])],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_an_export_that_is_equal_is_accepted():
    assert check(CONTEXT, network(), PIXELS, PIXELS @ WEIGHTS + BIAS) < 1e-5


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        (network(BIAS + 0.01), PIXELS @ WEIGHTS + BIAS),
        (network(is_of_batch=True), PIXELS @ WEIGHTS - (PIXELS @ WEIGHTS).mean(axis=0) + BIAS),  # right for all in one batch
    ],
    ids=["a wrong bias", "statistics of the batch"],
)
def test_an_export_that_differs_is_refused(exported: bytes, expected: np.ndarray):
    """In which batches, and by how much."""
    with pytest.raises(StepFailed, match="in batches of 1, ONNX Runtime's logits differ from PyTorch's by "):
        check(CONTEXT, exported, PIXELS, expected)
