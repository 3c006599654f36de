"""The outputs of a signature as columns: named as the client and `splitserve infer` name them, with fixed types."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from splitserve.arrays import DTYPES, Array, to_array
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.release import ScoringRelease
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, decode_bytes


class AnswerColumns:
    """The columns of a release's answer.

    An output of one value a row is a column of its name; of k values k columns, named after the classes or targets if the release
    has names for them, else ``NAME_0`` to ``NAME_{k-1}``.

    Raises:
        ScoringError: an output has a variable shape, or two columns have one name.
    """

    def __init__(self, release: ScoringRelease) -> None:
        self._specs = release.outputs
        self._names = [_names(spec, release.labels_of(spec.name)) for spec in release.outputs]
        fields = [pa.field(name, _type(spec)) for spec, names in zip(self._specs, self._names, strict=True) for name in names]
        self.schema = pa.schema(fields)
        """Without metadata."""
        if len(set(self.schema.names)) < len(fields):
            raise ScoringError(f"{release.name}: two columns of the answer have one name: {', '.join(self.schema.names)}")

    def arrays(self, outputs: Sequence[Tensor]) -> list[pa.Array]:
        """The columns of an answer, in the order of the schema.

        Raises:
            ScoringError: an output is not UTF-8 text.
        """
        by_name = {tensor.name: tensor for tensor in outputs}
        return [
            array
            for spec, names in zip(self._specs, self._names, strict=True)
            for array in _arrays(spec, by_name[spec.name], len(names))
        ]


def _names(spec: TensorSpec, labels: Sequence[str]) -> list[str]:
    inner = spec.wire_shape[1:]
    if any(size < 0 for size in inner):
        raise ScoringError(f'output "{spec.name}" has the variable shape {list(spec.wire_shape)}, which has no column form')
    width = math.prod(inner)
    if inner in ((), (1,)):
        return [spec.name]
    return [f"{spec.name}_{label}" for label in (labels if len(labels) == width else range(width))]


def _type(spec: TensorSpec) -> pa.DataType:
    if spec.datatype == "BYTES":
        return pa.string()
    return pa.float32() if spec.datatype == "BF16" else pa.from_numpy_dtype(DTYPES[spec.datatype])


def _arrays(spec: TensorSpec, tensor: Tensor, width: int) -> list[pa.Array]:
    if tensor.datatype != "BYTES":
        block: Array = to_array(tensor).reshape(tensor.n_rows, width)
        return [_numbers(np.ascontiguousarray(block[:, place])) for place in range(width)]
    elements = decode_bytes(tensor)
    try:
        return [_binary(elements[place::width]).cast(pa.string()) for place in range(width)]
    except pa.ArrowInvalid:
        raise ScoringError(f'output "{spec.name}" is not UTF-8 text, which has no column form') from None


def _numbers(column: Array) -> pa.Array:
    """From its bytes: `pyarrow.array` imports pandas first, which takes longer than scoring some rows."""
    if column.dtype == np.bool_:  # a bit each in Arrow
        return pa.array(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(column)])


def _binary(elements: Sequence[bytes]) -> pa.Array:
    """Likewise."""
    ends = np.cumsum([0, *map(len, elements)])
    if ends[-1] > np.iinfo(np.int32).max:
        return pa.array(elements, pa.binary())  # which says that it is too much
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(elements))]
    return pa.Array.from_buffers(pa.binary(), len(elements), buffers)
