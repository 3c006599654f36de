"""How trees are written into ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort

from splitserve.publishing.estimators.trees import Tree, leaf_numbers
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
