"""Simple models with the names and signatures that the example programs of Triton's clients expect.

``simple`` and ``simple_string`` add and subtract; ``simple_identity``, ``custom_identity_int32`` and ``identity_fp32`` … return
their input. Source: the model repository of Triton's client examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from splitserve.arrays import Array, objects
from splitserve.publishing.from_parts import publish_onnx
from splitserve.publishing.halves import repository_at

_OPSET, _IR_VERSION = 17, 8
"""Supported by every supported ONNX Runtime."""

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""Without BF16, which ONNX Runtime does not accept from Python."""

_ROW = np.arange(32).reshape(2, 16)


def publish_all(repository: str | os.PathLike[str]) -> Iterator[str]:
    """Publish the simple models that the repository does not have.

    Args:
        repository: folder or URL of the model repository.

    Yields:
        The name of each model after it was published.

    Raises:
        PublishError: the repository cannot be written.
    """
    store = repository_at(repository)
    for name, (model, inputs) in _models().items():
        if store.next_version(name, "predict") == 1:
            publish_onnx(model, inputs, name=name, repository=repository)
            yield name


def _models() -> dict[str, tuple[onnx.ModelProto, dict[str, Array]]]:
    numbers, text = _ROW.astype(np.int32), _as_text(_ROW)
    models = {
        "simple": (_sum_and_difference("INT32"), {"INPUT0": numbers, "INPUT1": numbers}),
        "simple_string": (_sum_and_difference("BYTES"), {"INPUT0": text, "INPUT1": text}),
        "simple_identity": (_identity("BYTES"), {"INPUT0": text}),
        "custom_identity_int32": (_identity("INT32"), {"INPUT0": numbers}),
    }
    for datatype, kind in ONNX_TYPES.items():
        sample = text if datatype == "BYTES" else _ROW.astype(helper.tensor_dtype_to_np_dtype(kind))
        models[f"identity_{datatype.lower()}"] = (_identity(datatype), {"INPUT0": sample})
    return models


def _as_text(array: Array) -> Array:
    return objects([str(number) for number in array.ravel().tolist()], array.shape)


def _identity(datatype: str) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])
    return _model([node], ["INPUT0"], ["OUTPUT0"], ONNX_TYPES[datatype], "size")


def _sum_and_difference(datatype: str) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; of BYTES, as decimal numbers."""
    names = ["INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1"]
    if datatype != "BYTES":
        return _model(_arithmetic(*names), names[:2], names[2:], ONNX_TYPES[datatype], 16)
    numbers = [f"{name}_number" for name in names]
    nodes = [
        *(
            helper.make_node("Cast", [name], [number], to=TensorProto.INT32)
            for name, number in zip(names[:2], numbers[:2], strict=True)
        ),
        *_arithmetic(*numbers),
        *(
            helper.make_node("Cast", [number], [name], to=TensorProto.STRING)
            for name, number in zip(names[2:], numbers[2:], strict=True)
        ),
    ]
    return _model(nodes, names[:2], names[2:], TensorProto.STRING, 16)


def _arithmetic(first: str, second: str, total: str, difference: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Add", [first, second], [total]), helper.make_node("Sub", [first, second], [difference])]


def _model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str], kind: int, size: int | str
) -> onnx.ModelProto:
    """A model whose inputs and outputs are all (batch, size) of one type."""
    specs = [[helper.make_tensor_value_info(name, kind, ["batch", size]) for name in names] for names in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", *specs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
