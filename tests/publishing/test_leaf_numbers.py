"""How trees are written into ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from splitserve.publishing.estimators.trees import Tree, leaf_numbers, tree_sums
from splitserve.publishing.graph import Graph


def test_the_children_of_a_root_have_different_numbers() -> None:
    """ONNX Runtime 1.22 compares them without asking whether they are leaves, and takes equal ones for a tree of one leaf."""
    tree = Tree(
        feature=np.zeros(5, np.int64),
        threshold=np.array([0.0, -1.0, 0.0, 0.0, 0.0]),
        left=np.array([1, 2, -1, -1, -1]),  # the root's children: node 1, and the leaf that would be number 1
        right=np.array([3, 4, -1, -1, -1]),
        nan_left=np.zeros(5, bool),
    )
    graph = Graph(np.float64)
    model = graph.model({"leaf": (leaf_numbers(graph.input("x", 1), [tree]), ("batch", 1))})
    (node,) = [node for node in model.graph.node if node.op_type == "TreeEnsemble"]
    written = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}

    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.array([[-2.0], [-0.5], [1.0]])})[0]

    assert written["nodes_truenodeids"][0] != written["nodes_falsenodeids"][0]
    assert found.ravel().tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_constant", [True, False])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0], [2]], ids=str)
def test_sums_are_added_in_the_order_of_the_trees(dtype: Any, is_constant: bool, chosen: list[int]) -> None:
    """From the start of each group, whatever the number of trees in it; some have one leaf."""
    big = dtype(2 / np.finfo(dtype).eps)  # one more is lost

    def stump(left: float, right: float) -> tuple[Tree, np.ndarray]:
        ends = np.array([-1, -1])
        children = [np.append(child, ends) for child in (1, 2)]
        return Tree(np.zeros(3, int), np.zeros(3), *children, np.zeros(3, bool)), np.array([0.0, left, right])

    leaf = (Tree(np.zeros(1, int), np.zeros(1), np.array([-1]), np.array([-1]), np.zeros(1, bool)), np.ones(1))
    groups = [[stump(big, 1.0), leaf, stump(-big, 2.0)], [leaf, stump(-1.0, big)], []]
    starts = np.array([1.0, 0.5, 7.0], dtype)[chosen]
    graph = Graph(dtype)
    x = graph.input("x", 1)

    sums = tree_sums(x, [groups[number] for number in chosen], starts if is_constant else x * 0.0 + starts)
    model = graph.model({"sums": (sums, ("batch", len(chosen)))})
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.array([[-1.0], [1.0]], dtype)})[0]

    assert found.tolist() == np.array([[0.0, 0.5, 7.0], [5.0, 1.5 + big, 7.0]], dtype)[:, chosen].tolist()
