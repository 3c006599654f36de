"""A loaded predictor by itself: what it answers to requests without rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from onnx import TensorProto, checker, helper

from splitserve.runtimes.predictor import Predictor
from splitserve.tensors import Tensor


def predictor(nodes: Sequence[tuple[str, list[str]]], out_shape: list[str | int | None]) -> Predictor:
    """A model of one input x (batch, width) and one output y, by operators that each take the result of the one before."""
    names = ["x", *(f"n{index}" for index in range(1, len(nodes))), "y"]
    graph = helper.make_graph(
        [
            helper.make_node(operator, [names[index], *more], [names[index + 1]], **({"axis": 1} if operator == "Concat" else {}))
            for index, (operator, more) in enumerate(nodes)
        ],
        "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return Predictor(model.SerializeToString())


def no_rows(width: int) -> Tensor:
    return Tensor("x", "FP32", (0, width), b"")


def test_no_rows_keep_the_width_that_input_and_output_share() -> None:
    """The graph has one name for both: the size is the request's."""
    (answer,) = predictor([("Identity", [])], ["batch", "width"]).infer([no_rows(16)])

    assert (answer.shape, answer.raw) == ((0, 16), b"")


def test_no_rows_have_the_width_that_one_row_would_have() -> None:
    """The size of the output is known to the model only: twice that of the input."""
    (answer,) = predictor([("Concat", ["x"])], ["batch", None]).infer([no_rows(16)])

    assert (answer.shape, answer.raw) == ((0, 32), b"")


def test_no_rows_of_an_enormous_width_cost_nothing() -> None:
    """A request without rows may claim any width; no row of that size is made up."""
    (answer,) = predictor([("Concat", ["x"])], ["batch", None]).infer([no_rows(2**31 - 1)])

    assert (answer.shape, answer.raw) == ((0, 0), b"")


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_answered_as_before(rows: int) -> None:
    """The same model, with rows."""
    x = Tensor("x", "FP32", (rows, 2), bytes(8 * rows))

    (answer,) = predictor([("Concat", ["x"])], ["batch", None]).infer([x])

    assert answer.shape == (rows, 4)
