"""Writes ONNX graphs as numpy expressions: each operation on a `Value` adds a node and gives the value that the node computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from splitserve.arrays import Array

OPSETS = {"": 18, "ai.onnx.ml": 5}
"""Supported by every supported ONNX Runtime."""

OLDER_OPSETS = {"": 18, "ai.onnx.ml": 3}
"""What other makers' converters get as their target; operators that mean something else in `OPSETS` are refused by `inline`."""

IR_VERSION = 10
_ML_OPERATORS = ("TreeEnsemble", "SVMClassifier", "SVMRegressor", "LabelEncoder")
_CHANGED = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
"""Removed from the operator set that `OPSETS` names."""


class Graph:
    """A graph that is being written.

    Args:
        dtype: numpy's, float32 or float64: what constants have in arithmetic with the input.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._opsets = dict(OPSETS)
        self._n_names = 0
        self._input: onnx.ValueInfoProto | None = None

    def input(self, name: str, n_features: int, *, is_sparse: bool = False) -> Value:
        """The only input, (batch, n_features)."""
        self._input = helper.make_tensor_value_info(name, _element(self.dtype), ["batch", n_features])
        return Value(self, name, self.dtype, is_sparse=is_sparse)

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """An array in the graph; numbers have the graph's datatype unless one is given, text has none."""
        values = np.asarray(array)
        if values.dtype.kind in "OUS":
            values = np.array([str(each) for each in values.ravel()], dtype=object).reshape(values.shape)
        else:
            values = values.astype(dtype if dtype is not None else self.dtype if values.dtype.kind == "f" else values.dtype)
        name = self._name("constant")
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return Value(self, name, values.dtype)

    def op(self, operator: str, *inputs: Value, dtype: Any = None, **attributes: Any) -> Value:
        """Add a node with one output.

        Args:
            operator: ONNX's name for it.
            inputs: its inputs.
            dtype: of the result; that of the first input by default.
            attributes: of the node.
        """
        return self.ops(operator, *inputs, dtypes=[dtype if dtype is not None else inputs[0].dtype], **attributes)[0]

    def ops(self, operator: str, *inputs: Value, dtypes: Sequence[Any], **attributes: Any) -> list[Value]:
        """Add a node with an output for each of ``dtypes``."""
        outputs = [self._name(operator) for _ in dtypes]
        domain = "ai.onnx.ml" if operator in _ML_OPERATORS else ""
        names = [value.name for value in inputs]
        self._nodes.append(helper.make_node(operator, names, outputs, name=outputs[0], domain=domain, **attributes))
        return [Value(self, name, np.dtype(dtype)) for name, dtype in zip(outputs, dtypes, strict=True)]

    def where(self, condition: Value, left: Any, right: Any) -> Value:
        """numpy.where."""
        known = next((each for each in (left, right) if isinstance(each, Value)), None)
        make = self.constant if known is None else known._constant_like
        first, second = (each if isinstance(each, Value) else make(each) for each in (left, right))
        if first.dtype != second.dtype:
            wide = np.result_type(first.dtype, second.dtype)
            first, second = first.astype(wide), second.astype(wide)
        return self.op("Where", condition, first, second, dtype=first.dtype)

    def loop(self, count: int, state: Value, body: Callable[[Value], tuple[Value, Value]]) -> Value:
        """Repeat a computation.

        Args:
            count: at most so many times.
            state: what the first time begins with.
            body: of a state, makes whether to go on (a boolean without dimensions) and the next state.
        """
        outer, self._nodes = self._nodes, []
        times, going, before = (self._name(kind) for kind in ("times", "going", "before"))
        goes_on, after = body(Value(self, before, state.dtype))
        names = [self._name(kind) for kind in ("goes_on", "after")]
        for value, name in zip((goes_on, after), names, strict=True):
            self._nodes.append(helper.make_node("Identity", [value.name], [name], name=name))
        element = _element(state.dtype)
        inner = helper.make_graph(
            self._nodes,
            self._name("body"),
            [
                helper.make_tensor_value_info(times, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                helper.make_tensor_value_info(before, element, None),
            ],
            [
                helper.make_tensor_value_info(names[0], TensorProto.BOOL, []),
                helper.make_tensor_value_info(names[1], element, None),
            ],
        )
        self._nodes = outer
        limit, always = self.constant(np.int64(count)), self.constant(np.bool_(True))
        return self.op("Loop", limit, always, state, dtype=state.dtype, body=inner)

    def inline(self, model: onnx.ModelProto, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Add the nodes of a model that is written already.

        Args:
            model: with opsets that agree with those of this graph.
            inputs: of the model, by name.

        Returns:
            Its outputs by name.

        Raises:
            ValueError: it needs another version of an operator set.
        """
        for entry in model.opset_import:
            known = self._opsets.setdefault(entry.domain, entry.version)
            if entry.version not in (known, OLDER_OPSETS.get(entry.domain, known)):
                raise ValueError(f'the model needs version {entry.version} of the operator set "{entry.domain or "ai.onnx"}"')
        if changed := sorted({node.op_type for node in model.graph.node}.intersection(_CHANGED)):
            raise ValueError(f"the model needs the operators {changed}, which newer operator sets do not have")
        prefix = self._name("inlined") + "/"
        inner = compose.add_prefix(model, prefix).graph
        for value in model.graph.input:
            if value.name in inputs:
                self._nodes.append(helper.make_node("Identity", [inputs[value.name].name], [prefix + value.name]))
        self._nodes.extend(inner.node)
        self._initializers.update({tensor.name: tensor for tensor in inner.initializer})
        return {
            value.name: Value(self, prefix + value.name, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            for value in model.graph.output
        }

    def model(self, outputs: Mapping[str, tuple[Value, Sequence[int | str]]]) -> onnx.ModelProto:
        """The finished model with these outputs and shapes, without nodes that none of them needs."""
        specs = []
        for name, (value, shape) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value.name], [name], name=name))
            specs.append(helper.make_tensor_value_info(name, _element(value.dtype), list(shape)))
        nodes = _needed(self._nodes, set(outputs))
        used = {name for node in nodes for name in _read_by(node)}
        initializers = [tensor for name, tensor in self._initializers.items() if name in used]
        assert self._input is not None, "a graph has an input"
        graph = helper.make_graph(nodes, "estimator", [self._input], specs, initializers)
        domains = {node.domain for node in nodes} | {""}
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items() if domain in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="splitserve")

    def _name(self, kind: str) -> str:
        self._n_names += 1
        return f"{kind}_{self._n_names}"


class Value:
    """What a node computes. Operands that are numbers or arrays become constants; of two datatypes the wider is computed with.

    ``is_sparse``: scikit-learn has these rows as a sparse matrix, without zeros, which XGBoost takes for missing values. So are
    columns of them, and what they are joined with.
    """

    __array_ufunc__ = None  # so that numpy leaves `array + value` to this class

    def __init__(self, graph: Graph, name: str, dtype: Any, *, is_sparse: bool = False) -> None:
        self.graph = graph
        self.name = name
        self.dtype = np.dtype(dtype)
        self.is_sparse = is_sparse

    def __add__(self, other: Any) -> Value:
        return self._binary("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self._binary("Add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self._binary("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._binary("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self._binary("Mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self._binary("Mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self._binary("Div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._binary("Div", other, self)

    def __matmul__(self, other: Any) -> Value:
        return self._binary("MatMul", self, other)

    def __pow__(self, other: Any) -> Value:
        return self._binary("Pow", self, other)

    def __neg__(self) -> Value:
        return self.graph.op("Neg", self)

    def __gt__(self, other: Any) -> Value:
        return self._binary("Greater", self, other, np.bool_)

    def __ge__(self, other: Any) -> Value:
        return self._binary("GreaterOrEqual", self, other, np.bool_)

    def __lt__(self, other: Any) -> Value:
        return self._binary("Less", self, other, np.bool_)

    def __le__(self, other: Any) -> Value:
        return self._binary("LessOrEqual", self, other, np.bool_)

    def equals(self, other: Any) -> Value:
        """Elementwise, as booleans."""
        return self._binary("Equal", self, other, np.bool_)

    def maximum(self, other: Any) -> Value:
        return self._binary("Max", self, other)

    def minimum(self, other: Any) -> Value:
        return self._binary("Min", self, other)

    def _binary(self, operator: str, left: Any, right: Any, dtype: Any = None) -> Value:
        first, second = (each if isinstance(each, Value) else self._constant_like(each) for each in (left, right))
        if first.dtype != second.dtype:
            wide = np.result_type(first.dtype, second.dtype)
            first, second = first.astype(wide), second.astype(wide)
        return self.graph.op(operator, first, second, dtype=dtype)

    def _constant_like(self, other: Any) -> Value:
        array = np.asarray(other)
        return self.graph.constant(array, self.dtype if self.dtype.kind == "f" and array.dtype.kind in "fiub" else None)

    def astype(self, dtype: Any) -> Value:
        wanted = np.dtype(dtype)
        return self if wanted == self.dtype else self.graph.op("Cast", self, dtype=wanted, to=_element(wanted))

    def as_sparse(self, is_sparse: bool) -> Value:
        """The same value, which scikit-learn has as a sparse matrix or not."""
        return Value(self.graph, self.name, self.dtype, is_sparse=is_sparse)

    def exp(self) -> Value:
        return self.graph.op("Exp", self)

    def log(self) -> Value:
        return self.graph.op("Log", self)

    def sqrt(self) -> Value:
        return self.graph.op("Sqrt", self)

    def abs(self) -> Value:
        return self.graph.op("Abs", self)

    def tanh(self) -> Value:
        return self.graph.op("Tanh", self)

    def sigmoid(self) -> Value:
        """In a form that does not overflow: 0.5 + 0.5 tanh(x/2) would lose small values, so by Exp of what is negative."""
        small = (-self.abs()).exp()
        return self.graph.where(self >= 0.0, 1.0 / (1.0 + small), small / (1.0 + small))

    def softmax(self, axis: int = 1) -> Value:
        exponentials = (self - self.max(axis)).exp()
        return exponentials / exponentials.sum(axis)

    def log_sum_exp(self, axis: int = 1) -> Value:
        greatest = self.max(axis)
        return (self - greatest).exp().sum(axis).log() + greatest

    def sum(self, axis: int = 1, *, keepdims: bool = True) -> Value:
        return self.graph.op("ReduceSum", self, self._axes(axis), keepdims=int(keepdims))

    def mean(self, axis: int = 1, *, keepdims: bool = True) -> Value:
        return self.graph.op("ReduceMean", self, self._axes(axis), keepdims=int(keepdims))

    def max(self, axis: int = 1, *, keepdims: bool = True) -> Value:
        return self.graph.op("ReduceMax", self, self._axes(axis), keepdims=int(keepdims))

    def min(self, axis: int = 1, *, keepdims: bool = True) -> Value:
        return self.graph.op("ReduceMin", self, self._axes(axis), keepdims=int(keepdims))

    def argmax(self, axis: int = 1) -> Value:
        """(n_rows,) of the first of equal ones, as numpy."""
        return self.graph.op("ArgMax", self, dtype=np.int64, axis=axis, keepdims=0)

    def argmin(self, axis: int = 1) -> Value:
        return self.graph.op("ArgMin", self, dtype=np.int64, axis=axis, keepdims=0)

    def running_sum(self, axis: int, *, keepdims: bool = False) -> Value:
        """The sum along an axis, added one after the other from the first, as a loop over `+=` does."""
        sums = self.graph.op("CumSum", self, self.graph.constant(np.int64(axis)))
        return sums.take([-1] if keepdims else -1, axis)

    def take(self, indices: Any, axis: int = 1) -> Value:
        """numpy.take: an axis for an array of indices, none for one index."""
        chosen = indices if isinstance(indices, Value) else self.graph.constant(np.asarray(indices, np.int64))
        return self.graph.op("Gather", self, chosen, axis=axis).as_sparse(self.is_sparse)

    def reshape(self, *shape: int) -> Value:
        return self.graph.op("Reshape", self, self.graph.constant(np.array(shape, np.int64)))

    def transpose(self, *axes: int) -> Value:
        return self.graph.op("Transpose", self, perm=list(axes))

    def is_nan(self) -> Value:
        return self.graph.op("IsNaN", self, dtype=np.bool_)

    def logical_and(self, other: Value) -> Value:
        return self.graph.op("And", self, other)

    def logical_or(self, other: Value) -> Value:
        return self.graph.op("Or", self, other)

    def logical_not(self) -> Value:
        return self.graph.op("Not", self)

    def smallest(self, count: int) -> tuple[Value, Value]:
        """The ``count`` smallest of each row with their indices, of equal ones the first."""
        n = self.graph.constant(np.array([count], np.int64))
        values, indices = self.graph.ops("TopK", self, n, dtypes=[self.dtype, np.int64], axis=1, largest=0, sorted=1)
        return values, indices

    def _axes(self, axis: int) -> Value:
        return self.graph.constant(np.array([axis], np.int64))


def concat(values: Sequence[Value], axis: int = 1) -> Value:
    """As numpy.concatenate; of several datatypes the widest."""
    wide = np.result_type(*[value.dtype for value in values])
    joined = values[0].graph.op("Concat", *[value.astype(wide) for value in values], axis=axis)
    return joined.as_sparse(any(value.is_sparse for value in values))


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that lead to the names wanted, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(_read_by(node))
    return kept[::-1]


def _read_by(node: onnx.NodeProto) -> list[str]:
    """Names that a node reads, those in its subgraphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names += _read_by(inner)
            names += [output.name for output in graph.output]
    return names


def _element(dtype: Array | Any) -> int:
    if np.dtype(dtype).kind in "OUS":
        return int(TensorProto.STRING)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
